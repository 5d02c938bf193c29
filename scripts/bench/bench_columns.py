"""What the columns of `probe.extras` cost beside the norms: processor time of the recording pass.

    python scripts/bench/bench_columns.py --model FOLDER --rows FILE.jsonl [--count 48]
        [--ways all ...] [--dtype bfloat16] [--length 192]
        [--output docs/results/bench_columns.json]

Prepares `count` rows and scores them on one rank and one thread, batch by batch, every way of
recording in turn, `--rounds` times: the plain pass (norms of embedding and head), each extra with
it, all that want no other gradient, all, and what method guided needs without any norms (layers:
[]). Processor seconds of the pass are counted, of each batch the least of all rounds. What does not
grow with the pool is left out (a recorder's trial of the model) or counted apart (the reference
directions, passes over a fixed number of rows). Prints a table of seconds and their ratio to the
plain pass; the aim for all columns is 1.5.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from grads_ds.config.config import Config
from grads_ds.data.collate import IGNORE_INDEX
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


def recorders(
    options: argparse.Namespace, folder: Path, chosen: list[str], model: Any, engine: Any
) -> tuple[dict[str, Callable[[Any], Any]], float]:
    """What scores a list of samples in each way, and the processor seconds of the references."""
    from grads_ds.engine.frozen_pass import score_batch, to_device
    from grads_ds.gradnorm import GradNormRecorder
    from grads_ds.probe.extra_columns import ExtraColumns

    def plain(recorder: GradNormRecorder) -> Callable[[Any], Any]:
        return lambda samples: score_batch(recorder, engine, to_device(samples))

    found: dict[str, Callable[[Any], Any]] = {}
    references = 0.0
    # all takes the references of every way
    for way in dict.fromkeys(["all", *chosen]):
        config = Config.model_validate(settings(options, folder, way))
        recorder = GradNormRecorder(model, layers=config.probe.layers, check=False)
        if not config.probe.extras:
            found[way] = plain(recorder)
            continue
        began = time.process_time()
        extras = ExtraColumns(config, folder / "run", "a measurement", recorder, engine)
        references = references or time.process_time() - began
        found[way] = extras.score
    return {way: found[way] for way in chosen}, references


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn, `rounds` times; least processor seconds."""
    import torch
    from datasets import load_from_disk

    from grads_ds.data.batches import plan_batches
    from grads_ds.data.stage import run_prepare
    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import lengths_of
    from grads_ds.engine.model import frozen_model

    torch.set_num_threads(1)
    chosen = list(dict.fromkeys(["plain", *(options.ways or ways())]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lines = options.rows.read_text().splitlines()[: options.count + REFERENCES]
        (folder / "pool.jsonl").write_text("\n".join(lines[REFERENCES:]) + "\n")
        (folder / "reference.jsonl").write_text("\n".join(lines[:REFERENCES]) + "\n")
        config = Config.model_validate(settings(options, folder, "plain"))
        run_prepare(config, folder / "run")
        rows = load_from_disk(str(folder / "run/prepared/pool"))
        lengths = lengths_of(rows)
        ranks.start()
        batches = plan_batches(lengths, 1, options.tokens, config.seed).batches[0]
        samples = [[rows[i] for i in batch] for batch in batches]
        with frozen_model(config, config.model.path) as (model, engine):
            scorers, references = recorders(options, folder, chosen, model, engine)
            least = {way: [math.inf] * len(samples) for way in chosen}
            for score in scorers.values():
                score(samples[-1])  # tries the model
            for number in range(options.rounds):
                for at, batch in enumerate(samples):
                    for way, score in scorers.items():
                        began = time.process_time()
                        score(batch)
                        least[way][at] = min(least[way][at], time.process_time() - began)
                now = ", ".join(f"{way} {sum(seconds):.2f} s" for way, seconds in least.items())
                print(f"after {number + 1} rounds: {now}", file=sys.stderr, flush=True)
        ranks.finish()
    plain = sum(least["plain"])
    table = {
        way: {"seconds": round(sum(seconds), 3), "ratio": round(sum(seconds) / plain, 3)}
        for way, seconds in least.items()
    }
    return {
        "model": options.model.name,
        "dtype": options.dtype,
        "rows": options.count,
        "tokens": int(lengths.sum()),
        "targets": sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:]),
        "rounds": options.rounds,
        "date": time.strftime("%Y-%m-%d"),
        "references": round(references, 3),
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
    print("| recorded | processor s | to the plain pass |\n|---|---:|---:|")
    for way, one in result["ways"].items():
        print(f"| {way} | {one['seconds']} | {one['ratio']} |")
    print(f"the reference directions of {REFERENCES} + {REFERENCES} rows: {result['references']} s")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
