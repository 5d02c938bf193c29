"""What the columns of `probe.extras` cost beside the norms: processor time of the recording pass.

    python scripts/bench/bench_columns.py --model FOLDER --rows FILE.jsonl [--count 48]
        [--dtype bfloat16] [--length 192] [--output docs/results/bench_columns.json]

Prepares `count` rows and scores them on one rank and one thread, each way of recording in a run of
its own and all of them in turn, `--rounds` times: the plain pass (norms of embedding and head),
each extra with it, all that want no other gradient, all, and what method guided needs without any
norms (layers: []). Processor seconds of the pass are counted, without loading the model; taking the
reference directions is counted apart (a pass over a fixed number of rows, whatever the pool's
size). Prints a table of medians and their ratio to the plain pass; the aim for all columns is 1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.probe_workload import ALLOCATOR

EXTRAS = ("ifd", "el2n", "surprise", "prompt_gain", "hidden", "fisher", "contrast", "anchor")
NO_GRADIENT = ("ifd", "el2n", "surprise", "prompt_gain", "hidden", "fisher")
GUIDED = ("ifd", "prompt_gain", "hidden")
NORMS = ("embedding", "lm_head")


def ways() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Name -> (layers, extras) of each way to record."""
    found = {"plain": (NORMS, ())}
    found |= {name: (NORMS, (name,)) for name in EXTRAS}
    found |= {"all without gradients": (NORMS, NO_GRADIENT), "all": (NORMS, EXTRAS)}
    return found | {"guided without norms": ((), GUIDED)}


def settings(options: argparse.Namespace, folder: Path, way: str) -> dict[str, Any]:
    """The config of one way; all share what is prepared."""
    layers, extras = ways()[way]
    probe: dict[str, Any] = {"epochs": 0, "layers": list(layers), "extras": list(extras)}
    if {"hidden", "fisher", "contrast", "anchor"} & set(extras):
        probe["anchor"] = "domain"
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(options.model.resolve()), "dtype": options.dtype},
        "data": {
            "train": [str(folder / "pool.jsonl")],
            "validation": {"domain": str(folder / "reference.jsonl")},
            "max_length": options.length,
        },
        "probe": probe | {"tokens_per_microbatch": options.tokens, "contrast_rows": 16},
    }


def one_pass(file: Path) -> None:
    """Score the prepared pool as the config says; prints the processor seconds as JSON."""
    import torch
    from datasets import load_from_disk

    from grads_ds.config.load import load_config
    from grads_ds.data.batches import plan_batches
    from grads_ds.data.stage import run_prepare
    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import lengths_of, score_batch, to_device
    from grads_ds.engine.model import frozen_model
    from grads_ds.gradnorm import GradNormRecorder
    from grads_ds.probe.extra_columns import ExtraColumns

    torch.set_num_threads(1)
    config = load_config(file)
    run = Path(config.run_dir)
    if not (run / "prepared/pool").is_dir():
        run_prepare(config, run)
    ranks.start()
    rows = load_from_disk(str(run / "prepared/pool"))
    plan = plan_batches(lengths_of(rows), 1, config.probe.tokens_per_microbatch, config.seed)
    with frozen_model(config, config.model.path) as (model, engine):
        recorder = GradNormRecorder(model, layers=config.probe.layers)
        (run / "probe/anchor.safetensors").unlink(missing_ok=True)
        before = time.process_time()
        extras = ExtraColumns(config, run, "a measurement", recorder, engine)
        began = time.process_time()
        for batch in plan.batches[0]:
            samples = [rows[i] for i in batch]
            if config.probe.extras:
                extras.score(samples)
            else:
                score_batch(recorder, engine, to_device(samples))
        spent = time.process_time() - began
    ranks.finish()
    tokens = int(lengths_of(rows).sum())
    print(json.dumps({"pass": spent, "references": began - before, "tokens": tokens}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn, `rounds` times; medians of processor seconds."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways()}
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = options.rows.read_text().splitlines()[: options.count + 16]
        (folder / "pool.jsonl").write_text("\n".join(lines[16:]) + "\n")
        (folder / "reference.jsonl").write_text("\n".join(lines[:16]) + "\n")
        for number in range(options.rounds):
            for way in ways():
                file = folder / "config.yaml"
                file.write_text(json.dumps(settings(options, folder, way)))
                command = [sys.executable, __file__, "--one-pass", str(file)]
                done = subprocess.run(
                    command, cwd=REPO, env=environment, capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}: {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    plain = statistics.median(one["pass"] for one in found["plain"])
    table = {
        way: {
            "seconds": round(seconds := statistics.median(one["pass"] for one in runs), 3),
            "ratio": round(seconds / plain, 3),
            "references": round(statistics.median(one["references"] for one in runs), 3),
        }
        for way, runs in found.items()
    }
    return {
        "model": options.model.name,
        "dtype": options.dtype,
        "rows": options.count,
        "tokens": found["plain"][0]["tokens"],
        "rounds": options.rounds,
        "date": time.strftime("%Y-%m-%d"),
        "ways": table,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one-pass", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_pass:
        one_pass(options.one_pass)
        return
    result = measure(options)
    print("| recorded | processor s | to the plain pass | references, s |\n|---|---:|---:|---:|")
    for way, one in result["ways"].items():
        print(f"| {way} | {one['seconds']} | {one['ratio']} | {one['references']} |")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
