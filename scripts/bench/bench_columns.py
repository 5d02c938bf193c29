"""What the columns of `probe.extras` cost beside the norms: processor time of the recording pass.

    python scripts/bench/bench_columns.py --model FOLDER --rows FILE.jsonl [--count 48]
        [--ways all ...] [--dtype bfloat16] [--length 192]
        [--output docs/results/bench_columns.json]

Prepares `count` rows and scores them on one rank and one thread, every way of recording in turn,
`--rounds` times: the plain pass (norms of embedding and head),
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
from grads_ds.config.config import Config
from scripts.bench.probe_workload import ALLOCATOR

EXTRAS = ("ifd", "el2n", "surprise", "prompt_gain", "hidden", "fisher", "contrast", "anchor")
NO_GRADIENT = ("ifd", "el2n", "surprise", "prompt_gain", "hidden", "fisher")
GUIDED = ("ifd", "prompt_gain", "hidden")
NORMS = ("embedding", "lm_head")
REFERENCES = 16  # rows of the reference set, and of the pool's own draw
ONE_THREAD = {**ALLOCATOR, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


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
        "probe": probe | {"tokens_per_microbatch": options.tokens, "contrast_rows": REFERENCES},
    }


def one_pass(config: Config) -> dict[str, float]:
    """Processor seconds of scoring the prepared pool as the config says, and of the references."""
    import torch
    from datasets import load_from_disk

    from grads_ds.data.batches import plan_batches
    from grads_ds.engine.frozen_pass import lengths_of, score_batch, to_device
    from grads_ds.engine.model import frozen_model
    from grads_ds.gradnorm import GradNormRecorder
    from grads_ds.probe.extra_columns import ExtraColumns

    torch.set_num_threads(1)
    run = Path(config.run_dir)
    rows = load_from_disk(str(run / "prepared/pool"))
    plan = plan_batches(lengths_of(rows), 1, config.probe.tokens_per_microbatch, config.seed)
    (run / "probe/anchor.safetensors").unlink(missing_ok=True)
    with frozen_model(config, config.model.path) as (model, engine):
        recorder = GradNormRecorder(model, layers=config.probe.layers)
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
    return {"pass": spent, "references": began - before, "tokens": float(lengths_of(rows).sum())}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn, `rounds` times; medians of processor seconds."""
    from grads_ds.data.stage import run_prepare
    from grads_ds.distributed import ranks

    chosen = dict.fromkeys(["plain", *(options.ways or ways())])
    found: dict[str, list[dict[str, float]]] = {way: [] for way in chosen}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = options.rows.read_text().splitlines()[: options.count + REFERENCES]
        (folder / "pool.jsonl").write_text("\n".join(lines[REFERENCES:]) + "\n")
        (folder / "reference.jsonl").write_text("\n".join(lines[:REFERENCES]) + "\n")
        configs = {way: Config.model_validate(settings(options, folder, way)) for way in chosen}
        run_prepare(configs["plain"], folder / "run")
        ranks.start()
        for number in range(options.rounds):
            for way, config in configs.items():
                found[way].append(one_pass(config))
                print(f"round {number + 1}: {way}: {found[way][-1]}", file=sys.stderr, flush=True)
        ranks.finish()
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
        "tokens": int(found["plain"][0]["tokens"]),
        "rounds": options.rounds,
        "date": time.strftime("%Y-%m-%d"),
        "ways": table,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(ways()), help="these and plain alone")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        command = [sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env=os.environ | ONE_THREAD).returncode)
    result = measure(options)
    print("| recorded | processor s | to the plain pass | references, s |\n|---|---:|---:|---:|")
    for way, one in result["ways"].items():
        print(f"| {way} | {one['seconds']} | {one['ratio']} | {one['references']} |")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
