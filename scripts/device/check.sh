#!/usr/bin/env bash
# Ten minutes on one GPU: what this project does there, as one JSON file.
#
#   bash scripts/device/check.sh --cpu                      a dry run here: small sizes, a minute
#   bash scripts/device/check.sh --kit KIT --piece PIECE [--unpack-only]
#   bash scripts/device/check.sh --kit KIT [--out DIR] [--minutes N] [--only STEP ...]
#
# On a machine without a registry: bring this checkout and the pieces that pack.sh made, unpack each
# piece (they may come one at a time), then check. Without --kit the packages of .venv, or of
# python3, are used. Writes DIR/device.json and DIR/device.log (default: runs/device). Exit status 0
# if every step was right or skipped, 1 if one failed, 2 for wrong arguments.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"

kit=
unpack_only=
pieces=()
rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --unpack-only) unpack_only=yes; shift ;;
        --kit | --piece)
            [ $# -gt 1 ] || {
                printf 'check: wanted a folder after %s; found none\n' "$1" >&2
                exit 2
            }
            if [ "$1" = --kit ]; then kit="$2"; else pieces+=("$2"); fi
            shift 2
            ;;
        *) rest+=("$1"); shift ;;
    esac
done
if [ -z "$kit" ] && [ "${#pieces[@]}${unpack_only:-}" != 0 ]; then
    printf 'check: wanted --kit DIR, where the pieces are unpacked; found none\n' >&2
    exit 2
fi

python="${PYTHON:-python3}"
[ -n "${PYTHON:-}$kit" ] || [ ! -x "$root/.venv/bin/python" ] || python="$root/.venv/bin/python"
if [ -n "$kit" ]; then
    for piece in "${pieces[@]}"; do
        "$python" "$root/scripts/device/unpack.py" --kit "$kit" "$piece"
    done
    [ -z "$unpack_only" ] || exit 0
    [ -d "$kit/site" ] || {
        printf 'check: wanted unpacked wheels in %s; found none\n' "$kit" >&2
        exit 2
    }
    kit="$(cd "$kit" && pwd -P)"
    export PYTHONPATH="$kit/site"
    # the checkout as it is now, installed as a user installs it, from a copy without old builds
    rm -rf "$kit/source" && mkdir "$kit/source"
    (cd "$root" && tar -c --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./build .) |
        tar -x -C "$kit/source"
    "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade \
        --target "$kit/site" "$kit/source"
    rest+=(--kit "$kit")
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "$python" "$root/scripts/device/check.py" ${rest[@]+"${rest[@]}"}
