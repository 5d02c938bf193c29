"""Every stage, with its real engines, on a file system that fails: each error of the system, while
writing and while reading, at several calls. The status, the traceback and the next start are held.

    python scripts/faults/storage_errors.py [--points 3] [--write]

A single rank on a CPU and a model of a few thousand parameters. Needs a C compiler and Linux. From
the n-th call on, every call below the run directory that writes (or reads) fails with the error.
--write puts the numbers into docs/results/storage_errors.json and their table into docs/trust.md.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
from scripts.faults import broken_calls
from scripts.faults.broken_calls import COUNT, FULL, READS, REPO, armed, attempt, calls_of
from scripts.faults.table import put

STAGES = ("prepare", "probe", "select", "sft", "evaluate", "report")
# (name, how the shim fails, what it returns, exit status)
ERRORS = (
    ("ENOSPC", FULL, errno.ENOSPC, 7),
    ("EDQUOT", FULL, errno.EDQUOT, 7),
    ("EIO", FULL, errno.EIO, 8),
    ("ESTALE", FULL, errno.ESTALE, 8),
    ("EIO", READS, errno.EIO, 8),
    ("ESTALE", READS, errno.ESTALE, 8),
)
NUMBERS, PAGE = REPO / "docs/results/storage_errors.json", REPO / "docs/trust.md"
MARKS = ("<!-- errors: scripts/faults/storage_errors.py -->", "<!-- end of errors -->")
TOLD, PASSED, WRONG = "told", "without consequence", "WRONG"


def make(folder: Path) -> None:
    """A model, data and a config whose every stage takes a second."""
    import yaml

    from conftest import make_tiny_model, write_rows

    make_tiny_model(folder / "model")
    for number, name in enumerate(("pool", "domain")):
        write_rows(folder / f"{name}.jsonl", 12, seed=number)
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["pool.jsonl"], "validation": {"domain": "domain.jsonl"}},
        "probe": {"epochs": 0},
        "select": {"budget": 0.5},
        "sft": {"epochs": 1, "batch_size": 2, "checkpoint_steps": 1},
        "deepspeed": "zero3.json",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def stage(folder: Path, name: str) -> int:
    """One stage in one process, as `deepspeed --module grads_ds` starts it; ends the process."""
    from grads_ds.cli import main

    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    os.environ.update(rank | {"MASTER_ADDR": "127.0.0.1"})
    os.chdir(folder)
    return main([name, "config.yaml"])


def broken(folder: Path, name: str, points: int, errors: tuple[Any, ...]) -> list[dict[str, Any]]:
    """How a stage ends under each error at `points` of its calls, and its next start: `folder`
    holds the job just before the stage, and afterwards with it done.
    """
    run, before, said = folder / "run", folder.with_name("before"), folder.with_name("said")
    run.mkdir(exist_ok=True)
    _copy(run, before)
    calls = {}
    for mode in {mode for _, mode, *_ in errors}:
        _copy(before, run)
        calls[mode] = calls_of(lambda: stage(folder, name), run, COUNT if mode == FULL else mode)
    found = []
    for what, mode, number, wanted in errors:
        ends: Counter[str] = Counter()
        for point in range(1, points + 1):
            _copy(before, run)
            n = max(1, calls[mode] * point // (points + 1))
            status = attempt(lambda: stage(folder, name), armed(run, n, mode, number), said)
            text = said.read_text(errors="replace")
            told = status == wanted and "Traceback" in text and f"exit status {wanted}" in text
            # what is only shown (TensorBoard, a log) may be lost
            end = TOLD if told and "in the input" not in text else PASSED if status == 0 else WRONG
            again = attempt(lambda: stage(folder, name), None, said)
            if end == WRONG or again:
                text = text if end == WRONG else said.read_text(errors="replace")
                print(f"{name}, {what} from call {n}: {status}, then {again}: {text[-3000:]}")
                end = WRONG
            ends[end] += 1
        kind = "reads" if mode == READS else "writes"
        row = {"stage": name, "error": what, "calls": kind, "of": calls[mode], "status": wanted}
        found.append(row | {"ends": dict(ends)})
    return found


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def table(found: list[dict[str, Any]]) -> str:
    """The numbers as Markdown."""
    lines = [
        "| stage | error | from the n-th of | status | how they ended |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        ends = ", ".join(f"{end} {count}" for end, count in sorted(row["ends"].items()))
        cells = (row["stage"], row["error"], f"{row['of']:,} {row['calls']}", row["status"], ends)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(options: argparse.Namespace) -> int:
    """Break every stage, print the table; the exit status."""
    import grads_ds.data.stage
    import grads_ds.evaluate.stage
    import grads_ds.probe.stage
    import grads_ds.report.stage
    import grads_ds.selection.stage  # noqa: F401
    import tests.imported_by_ranks  # noqa: F401

    found = []
    with broken_calls.scratch() as base:
        folder = Path(base, "job")
        folder.mkdir()
        assert attempt(lambda: make(folder) or 0) == 0
        for number, name in enumerate(STAGES):
            # a draw takes one error of writes and one of reads at each stage, in turn
            drawn = (ERRORS[number % 4], ERRORS[4 + number % 2]) if options.draw else ERRORS
            found += broken(folder, name, options.points, drawn)
    print(table(found), flush=True)
    if options.write:
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
        put(PAGE, MARKS, table(found))
    return int(any(WRONG in row["ends"] for row in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=3, help="calls broken under each error")
    parser.add_argument("--draw", action="store_true", help="two errors for each stage")
    parser.add_argument("--write", action="store_true", help="into docs/")
    chosen = parser.parse_args()
    broken_calls.preload()
    sys.exit(main(chosen))
