"""What does each method of selection keep of noise rows planted on purpose? The table in
docs/selection.md.

    python scripts/study/planted_noise.py --material FOLDER [--seeds 0 1] [--out runs/planted_noise]
    [--collect]

Reads a domain's chat rows and a small model below FOLDER. Per seed it makes a pool of clean rows,
near-duplicates, swapped answers, rows of another domain and trivial answers
(scripts/study/pools.py), records norms and all extra columns (`grads-ds run --to select`), and
takes selection/comparison.json. Writes docs/results/planted_noise.json and the table between the
marks in docs/selection.md: means over the seeds. Resumable: finished runs are not repeated.
--collect only gathers.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.study import pools

MODEL = "models/base-8M"
DOMAIN, OFF_DOMAIN = "data/medicine_medquad6k.jsonl", "data/general_alpaca9k.jsonl"
ANCHOR = "models/base-8M/general_held_out.jsonl"
# SHARE of SIZE is three kinds of noise; TRIVIAL samples come on top
SIZE, SHARE, TRIVIAL, ANCHOR_ROWS = (800, 0.375, 100, 64)
SHORT = ("Yes.", "No.", "I do not know.", "Ask a doctor.", "It depends.")
MARKS = ("<!-- planted noise: scripts/study/planted_noise.py -->", "<!-- end of planted noise -->")
PROBE = {
    "epochs": 0.25,
    "learning_rate": 3.0e-4,
    "batch_size": 16,
    "micro_batch_size": 8,
    "tokens_per_microbatch": 4096,
}


def make_pool(domain: list[pools.Row], off_domain: list[pools.Row], seed: int) -> list[pools.Row]:
    """SIZE planted rows and TRIVIAL ones, shuffled, each with its `kind`."""
    rows = pools.distinct(domain, SIZE + TRIVIAL, seed)
    draw = random.Random(seed)
    pool = pools.plant(rows[:SIZE], off_domain, SIZE, SHARE, seed)
    pool += [
        {**pools.with_answer(row, draw.choice(SHORT)), "kind": "trivial"} for row in rows[SIZE:]
    ]
    draw.shuffle(pool)
    return pool


def run_seed(material: Path, folder: Path, seed: int) -> None:
    """Make the pool and the anchor, and run the pipeline up to the choice."""
    folder.mkdir(parents=True, exist_ok=True)
    # every 20th was in the model's pre-training
    domain = pools.read_rows([material / DOMAIN], skip_every=20)
    pool = make_pool(domain, pools.read_rows([material / OFF_DOMAIN]), seed)
    anchor = random.Random(seed).sample(pools.read_rows([material / ANCHOR]), ANCHOR_ROWS)
    for name, rows in (("pool", pool), ("anchor", anchor)):
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        file = folder / f"{name}.jsonl"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)
    config = {
        "run_dir": str(folder / "run"),
        "seed": seed,
        "deepspeed": "zero3",
        "model": {"path": str(material / MODEL), "dtype": "float32"},
        "data": {"train": [str(folder / "pool.jsonl")], "metadata": ["kind"], "max_length": 192},
        "probe": (
            PROBE
            | {
                "extras": ["ifd", "el2n", "anchor", "early"],
                "anchor": [str(folder / "anchor.jsonl")],
            }
        ),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [
        sys.executable,
        "-m",
        "grads_ds",
        "run",
        str(folder / "config.yaml"),
        "--to",
        "select",
    ]
    with open(folder / "log", "a") as log:
        if subprocess.run(command, cwd=REPO, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(
                f"planted noise: seed {seed} failed; its last words are in {folder / 'log'}"
            )


def collect(out: Path, seeds: list[int]) -> dict[str, Any]:
    """The finished seeds' comparisons, and their mean in the shape of one."""
    found = {
        seed: json.loads(file.read_text())
        for seed in seeds
        if (file := out / f"seed{seed}/run/selection/comparison.json").is_file()
    }
    if not found:
        raise SystemExit(
            f"planted noise: wanted a finished seed; found none in {out}; run without --collect"
        )
    reports = {
        seed: json.loads((out / f"seed{seed}/run/selection/selection.json").read_text())["length"]
        for seed in found
    }
    first = next(iter(found.values()))
    budgets, kinds = first["budgets"], sorted(first["methods"]["random"]["0.05"]["kept"]["kind"])
    middle = {
        method: {
            budget: {
                "kept": {
                    "kind": {
                        k: round(
                            mean(
                                f["methods"][method][budget]["kept"]["kind"][k]
                                for f in found.values()
                            ),
                            4,
                        )
                        for k in kinds
                    }
                }
            }
            for budget in budgets
        }
        for method in first["methods"]
    }
    return {
        "made_by": "scripts/study/planted_noise.py",
        "model": MODEL,
        "pool": {"size": SIZE + TRIVIAL, "noise of three kinds": SHARE, "trivial": TRIVIAL},
        "probe": PROBE,
        "seeds": list(found),
        "rank correlation of signal and target tokens": [
            t["spearman_signal_length"] for t in reports.values()
        ],
        "mean": {"budgets": budgets, "methods": middle, "skipped": first["skipped"]},
        "by_seed": {str(seed): comparison["methods"] for seed, comparison in found.items()},
    }


def with_table(text: str, table: str) -> str:
    """The document with `table` between its marks.

    Raises ValueError where the marks are missing.
    """
    before, begin, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(
            f"wanted the marks {MARKS[0]} and {MARKS[1]}; found them missing; put them back"
        )
    return f"{before}{begin}\n{table}\n{end}{after}"


def as_markdown(comparison: Mapping[str, Any], field: str) -> str:
    """The share of each kind kept, a line per method and a column per budget and value."""
    methods = comparison["methods"]
    values = list(next(iter(methods.values()))[comparison["budgets"][0]]["kept"][field])
    head = [f"{word} at {float(budget):.0%}" for budget in comparison["budgets"] for word in values]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, entry in methods.items():
        cells = [
            f"{entry[budget]['kept'][field].get(word, 0):.1%}"
            for budget in comparison["budgets"]
            for word in values
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--material", type=Path, help="folder that holds the model and the data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/planted_noise"))
    parser.add_argument(
        "--collect", action="store_true", help="run nothing; gather what is finished"
    )
    options = parser.parse_args()
    if not options.collect:
        if options.material is None:
            parser.error("--material: wanted the folder that holds the model and the data")
        for seed in options.seeds:
            run_seed(options.material.resolve(), options.out.resolve() / f"seed{seed}", seed)
            print(f"planted noise: seed {seed} done", flush=True)
    results = collect(options.out, options.seeds)
    (REPO / "docs/results/planted_noise.json").write_text(json.dumps(results, indent=1) + "\n")
    table = as_markdown(results["mean"], "kind")
    document = REPO / "docs/selection.md"
    document.write_text(with_table(document.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
