"""`grads-ds check RUN`: read every file that a run's records name once more, and say what is
damaged and what to do about it. Changes nothing.

Reads the run directory alone. Exit status 0 when all is as it was written, 1 otherwise. Units that
were begun and have no record of an end are named; they are no damage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from grads_ds.config.errors import printable
from grads_ds.run_dir.digests import sha256
from grads_ds.run_dir.ownership import require_run
from grads_ds.run_dir.provenance import RESOLVED, resolved_is_whole
from grads_ds.run_dir.units import damaged_outputs, read_record_file
from grads_ds.training.checkpoint_mark import altered_files, read_mark

AGAIN = "grads-ds run CONFIG makes it again, and what follows from it"
CHECKPOINTS = ("probe/checkpoints", "sft/checkpoints", "sft/variants/*/checkpoints")


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    command.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Print what was read and what is damaged."""
    run_dir: Path = args.run
    require_run(run_dir)
    whole, damaged = 0, []
    for what, wrong, files, advice in findings(run_dir):
        whole += files - len(wrong)
        damaged += [f"{what}: {sentence}; {advice}" for sentence in wrong]
    for sentence in damaged:
        print(printable(f"damaged  {sentence}"))
    open_ended = begun(run_dir)
    for unit in open_ended:
        print(printable(f"unknown  {unit}: begun, with no record of an end; {AGAIN}"))
    counts = f"check: {whole:,} files as they were written, {len(damaged):,} damaged"
    print(counts + (f", units without a record: {len(open_ended):,}" if open_ended else ""))
    return 1 if damaged else 0


def begun(run_dir: Path) -> list[str]:
    """Units that have begun and have no record: unfinished ones, or ones whose record is gone."""
    files = sorted((run_dir / "state").glob("*.owned"))
    return [file.stem for file in files if not file.with_suffix(".json").exists()]


def findings(run_dir: Path) -> Iterator[tuple[str, list[str], int, str]]:
    """(what, what of it is damaged, how many files it has, what to do) for every record, score part
    and checkpoint. Raises OSError for a file that cannot be read.
    """
    from grads_ds.scores.parts import DIGITS  # pyarrow: slow to import

    for file in sorted((run_dir / "state").glob("*.json")):
        record = read_record_file(file)
        if record is None:
            yield file.stem, ["its record is damaged"], 1, AGAIN
        else:
            wrong = damaged_outputs(run_dir, record, thorough=True)
            yield record["unit"], wrong, len(record["outputs"]), AGAIN
    if (run_dir / RESOLVED).is_file():
        wrong = [] if resolved_is_whole(run_dir) else [f"{RESOLVED} was altered"]
        yield "config", wrong, 1, "the next unit that is done writes it again"
    parts = sorted((run_dir / "scores").glob("part-*.parquet"))
    wrong = [
        f"{file.name} was altered"
        for file in parts
        if not file.is_file() or sha256(file)[:DIGITS] != file.stem[-DIGITS:]
    ]
    yield "scores", wrong, len(parts), "the next probe sets it aside and scores its samples again"
    for pattern in CHECKPOINTS:
        for mark in sorted(run_dir.glob(f"{pattern}/checkpoint-*/complete")):
            yield _checkpoint(mark.parent)


def _checkpoint(folder: Path) -> tuple[str, list[str], int, str]:
    mark = read_mark(folder)
    advice = "the next start sets it aside and goes on from the one before it"
    if mark is None:
        return str(folder), ["its mark is damaged"], 1, advice
    wrong = [f"{name} was altered" for name in altered_files(folder, mark["files"], mark["files"])]
    return str(folder), wrong, len(mark["files"]), advice
