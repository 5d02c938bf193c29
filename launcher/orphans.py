"""Ranks whose launcher is gone: found by their records, told to stop through their job folder,
waited for.

Before a start takes over a run, the last one's ranks must have ended: two jobs that record into one
run directory would double its rows. Reads and writes `logs/<stage>/<time>/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grads_ds.launcher.records import publish, read
from grads_ds.run_dir.processes import process_gone

SILENT_SECONDS = 30.0  # a supervisor that has not beaten for so long while watched is gone
OLD_SECONDS = 120.0  # one whose record looks as old as this is watched for a few beats only
BRIEF_SECONDS = 5.0
_LIVING = ("starting", "running")
Orphan = tuple[Path, dict[str, Any]]


def living(run_dir: Path) -> list[Orphan]:
    """(record file, record) of every rank that has not reported its end in a job without an
    outcome, whose process is not known to be gone.
    """
    found = []
    for job in (run_dir / "logs").glob("*/*/job.json"):
        if read(job.with_name("outcome.json")):
            continue
        for file in sorted(job.parent.glob("rank*.json")):
            record = read(file)
            if record.get("state") in _LIVING and not _gone(record):
                found.append((file, record))
    return found


def _gone(record: dict[str, Any]) -> bool:
    return process_gone(record | {"pid": record.get("supervisor")})


def names(orphans: list[Orphan]) -> str:
    """The ranks and their hosts, for a sentence."""
    shown = [f"rank {record['rank']} on {record['host']}" for _, record in orphans[:8]]
    return ", ".join(shown) + (f" and {len(orphans) - 8} more" if len(orphans) > 8 else "")


def end(run_dir: Path, why: str, say: Callable[[str], None], grace: float = 20.0) -> int:
    """Tell every rank without a launcher to stop and stay until all have ended or are silent by
    this process's clock; how many there were.

    Call it with the run directory's lock held: nobody else's ranks are at work then.

    Args:
        run_dir: the run directory.
        why: the reason that the ranks' records will give.
        say: takes one sentence for the terminal.
        grace: seconds from SIGTERM to SIGKILL.
    """
    orphans = living(run_dir)
    if not orphans:
        return 0
    say(f"the last start's ranks are still at work: {names(orphans)}; they are told to stop")
    for folder in {file.parent for file, _ in orphans}:
        control = read(folder / "control.json")
        beat = int(control.get("beat", 0)) + 1
        publish(folder / "control.json", control | {"beat": beat, "stop": why, "grace": grace})
    began = time.monotonic()
    changed = {file: began for file, _ in orphans}
    before = dict(orphans)
    left = set(before)
    while left:
        time.sleep(0.2)
        now = time.monotonic()
        for file in sorted(left):
            record = read(file)
            if record and record != before[file]:
                before[file], changed[file] = record, now
            old = time.time() - float(before[file].get("time", 0.0)) > OLD_SECONDS
            silent = now - changed[file] > (BRIEF_SECONDS if old else SILENT_SECONDS)
            ended = record and record.get("state") not in _LIVING
            if ended or silent or _gone(before[file]):
                left.discard(file)
    say(f"they have ended ({time.monotonic() - began:.0f} s)")
    return len(orphans)
