"""Rows per second of `prepare` against `datasets.map(num_proc)` doing the same tokenisation.

    python scripts/bench/prepare_against_map.py [--rows 200000] [--repeats 3] [--out FILE.json]

Writes that many chats, and runs on the same file, in turn and in processes of their own: this
checkout's `grads-ds prepare`, and `load_dataset` followed by `map(num_proc=cores)` over the chat
template with its assistant mask and `save_to_disk`. Both end with the same input_ids and labels on
disk, which is checked row by row. Prints and writes seconds, rows per second, processor seconds and
the peak of proportional memory of each, with the files they map (PSS) and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_prepare import REPO, measure, write_chats, write_model


def map_rows(chats: Path, model: Path, out: Path) -> None:
    """The rival: chats -> input_ids and labels by `datasets.map`, all cores."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        said = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(said["input_ids"], said["assistant_masks"], strict=True)
        labels = [[t if m else -100 for t, m in zip(*pair, strict=True)] for pair in pairs]
        return {"input_ids": said["input_ids"], "labels": labels}

    cores = len(os.sched_getaffinity(0))
    rows = load_dataset("json", data_files=str(chats), split="train", cache_dir=f"{out}-cache")
    rows = rows.map(encode, batched=True, num_proc=cores)
    rows.save_to_disk(str(out), num_proc=cores)


def same_rows(ours: Path, theirs: Path) -> int:
    """How many rows both have; ends the script where tokens or targets differ."""
    from datasets import load_from_disk

    one, other = (load_from_disk(str(folder)).with_format("arrow") for folder in (ours, theirs))
    for name in ("input_ids", "labels"):
        for first in range(0, len(one), 10_000):
            pair = [
                [value.as_py() for value in rows[first : first + 10_000][name]]
                for rows in (one, other)
            ]
            if pair[0] != pair[1]:
                raise SystemExit(f"{name} differ in rows {first} to {first + 10_000}")
    if len(one) != len(other):
        raise SystemExit(f"{len(one)} rows against {len(other)}")
    return len(one)


def main() -> None:
    """Measure both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--map", nargs=3, type=Path, help="the rival alone: chats, model, out")
    args = parser.parse_args()
    if args.map:
        map_rows(*args.map)
        return
    from tests.data import twins

    variables = {"PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        chats, model, config = folder / "chats.jsonl", folder / "model", folder / "config.json"
        write_chats(chats, args.rows)
        write_model(model, twins.CHATML_MARKED)
        for repeat in range(args.repeats):
            run, out = folder / f"run-{repeat}", folder / f"map-{repeat}"
            settings = {
                "run_dir": str(run),
                "model": {"path": str(model)},
                "data": {"train": [str(chats)]},
            }
            config.write_text(json.dumps(settings))  # JSON is YAML
            sides = {
                "prepare": [sys.executable, "-m", "grads_ds", "prepare", str(config)],
                "map": [sys.executable, __file__, "--map", *map(str, (chats, model, out))],
            }
            for side in sorted(sides, reverse=bool(repeat % 2)):
                figures = measure(sides[side], args.rows, REPO, variables)
                results.append({"side": side, "repeat": repeat, **figures})
                print(json.dumps(results[-1]), flush=True)
            rows = same_rows(run / "prepared/pool", out)
    rates = {
        side: statistics.median(r["rows_per_second"] for r in results if r["side"] == side)
        for side in ("prepare", "map")
    }
    record = {
        "script": "scripts/bench/prepare_against_map.py",
        "rows": rows,
        "cpus": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[1],
        "median_rows_per_second": rates,
        "ratio": round(rates["prepare"] / rates["map"], 3),
        "results": results,
    }
    print(json.dumps({"median_rows_per_second": rates, "ratio": record["ratio"]}))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
