"""How a run is getting on, from its files alone (status_text.py words it, metrics.py has it for
Prometheus).

Reads `state/`, `lock.json`, `logs/<stage>/<time>/` and checkpoints of a run directory, from any
machine that sees it; writes nothing. Times of other hosts are compared with this one's clock, to
the second at best.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.launcher import orphans, stragglers
from grads_ds.launcher.records import read
from grads_ds.run_dir.lock import lock_holder
from grads_ds.run_dir.ownership import MARKER

SILENT_SECONDS = 30.0


def snapshot(run_dir: Path) -> dict[str, Any]:
    """Everything known of the run, ready for JSON.

    Raises UserError when there is no run at `run_dir`.
    """
    if not any((run_dir / name).exists() for name in ("state", "logs", "lock.json", MARKER)):
        raise UserError(
            f"{run_dir}: wanted a run directory; found"
            f" {'no run in it' if run_dir.is_dir() else 'nothing'}; give run_dir of a config"
        )
    now, holder = time.time(), lock_holder(run_dir)
    finished = [record for file in (run_dir / "state").glob("*.json") if (record := read(file))]
    finished.sort(key=lambda record: str(record.get("finished")))
    folders = sorted(
        (file.parent for file in (run_dir / "logs").glob("*/*/job.json")),
        key=lambda folder: folder.name,
    )
    return {
        "run_dir": str(run_dir),
        "time": now,
        "finished": [
            {key: record.get(key) for key in ("unit", "finished", "seconds")} for record in finished
        ],
        "holder": holder,
        "orphans": [] if holder else _orphans(run_dir, now),
        "job": _job(folders[-1], now) if folders else None,
        "checkpoint": _checkpoint(run_dir, now),
    }


def _orphans(run_dir: Path, now: float) -> list[dict[str, Any]]:
    """Ranks that are at work although nobody holds the run: their launcher was killed."""
    return [
        {"rank": record["rank"], "host": record["host"], "seconds": round(now - record["time"])}
        for _, record in orphans.living(run_dir)
        if now - record.get("time", now) <= SILENT_SECONDS
    ]


def _job(folder: Path, now: float) -> dict[str, Any]:
    records = [record for file in sorted(folder.glob("rank*.json")) if (record := read(file))]
    wanted = sum(slots for _, slots in read(folder / "job.json").get("hosts", []))
    outcome = read(folder / "outcome.json")
    alive = [record for record in records if record.get("state") in ("starting", "running")]
    silent = (
        []
        if outcome
        else [record for record in alive if now - record.get("time", now) > SILENT_SECONDS]
    )
    lead: dict[str, Any] = next(
        (record["progress"] for record in records if "progress" in record), {}
    )
    behind = min(
        alive, key=lambda record: record.get("progress", {}).get("time", now), default=None
    )
    return {
        "stage": folder.parent.name,
        "folder": str(folder),
        "ranks": wanted,
        "states": dict(Counter(str(record.get("state")) for record in records)),
        "doing": lead.get("doing"),
        "done": lead.get("done"),
        "total": lead.get("total"),
        "eta_seconds": _eta(lead),
        "steps_per_second": _rate(lead),
        "memory": _memory(alive),
        "losses": next((record["losses"] for record in records if record.get("losses")), []),
        "silent": [
            {"rank": r["rank"], "host": r["host"], "seconds": round(now - r["time"])}
            for r in silent
        ],
        "slowest": (
            {"rank": behind["rank"], "host": behind["host"], "lag_seconds": _lag(alive)}
            if behind
            else None
        ),
        "slow": [
            asdict(one) | {"sentence": one.sentence}
            for one in stragglers.find_stragglers([] if outcome else alive) or []
        ],
        "outcome": outcome or None,
    }


def _eta(progress: dict[str, Any]) -> float | None:
    """Seconds until the last step, at the rate since the first one; None before there is one."""
    rate, total = _rate(progress), progress.get("total")
    if not rate or not total:
        return None
    return round(float((total - progress["done"]) / rate), 1)


def _rate(progress: dict[str, Any]) -> float | None:
    """Steps a second since the first one; None before there is one."""
    done = progress.get("done")
    if not done or done <= progress.get("first", 0):
        return None
    return float((done - progress["first"]) / max(1e-9, progress["time"] - progress["since"]))


def _memory(alive: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Bytes of the rank that holds most now, and what any of them held at most."""
    known = [record for record in alive if record.get("memory")]
    if not known:
        return None
    top = max(known, key=lambda record: int(record["memory"].get("resident", 0)))
    return {
        "rank": top["rank"],
        "host": top["host"],
        "resident": int(top["memory"].get("resident", 0)),
        "resident_most": max(int(record["memory"].get("resident_most", 0)) for record in known),
        "gpu_most": max(int(record.get("gpu_most", 0)) for record in known),
    }


def _lag(records: list[dict[str, Any]]) -> float:
    times = [record["progress"]["time"] for record in records if "progress" in record]
    return round(max(times) - min(times), 2) if times else 0.0


def _checkpoint(run_dir: Path, now: float) -> dict[str, Any] | None:
    marks = [
        *run_dir.glob("*/checkpoints/checkpoint-*/complete"),
        *run_dir.glob("*/variants/*/checkpoints/checkpoint-*/complete"),
    ]
    if not marks:
        return None
    last = max(marks, key=lambda mark: mark.stat().st_mtime)
    step = int(last.parent.name.rpartition("-")[2])
    return {
        "path": str(last.parent),
        "step": step,
        "age_seconds": round(now - last.stat().st_mtime),
    }
