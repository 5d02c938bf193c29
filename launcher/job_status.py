"""How a run is getting on, from its files alone: `snapshot` reads, `to_text` words it
(metrics.py has it for Prometheus).

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

from grads_ds.config.errors import UserError, printable
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
    done, total = progress.get("done"), progress.get("total")
    if not done or not total or done <= progress.get("first", 0):
        return None
    step_seconds = (progress["time"] - progress["since"]) / (done - progress["first"])
    return round(float(step_seconds * (total - done)), 1)


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


def to_text(seen: dict[str, Any], stages: tuple[str, ...]) -> str:
    """A few lines for people."""
    done = {str(record["unit"]).split("/")[0] for record in seen["finished"]}
    job, holder = seen["job"], seen["holder"]
    lines = [
        f"{seen['run_dir']}: "
        + (
            f"{holder['what']} on {holder['host']} since {holder['since']}"
            if holder
            else "nobody at work"
        )
    ]
    if seen["orphans"]:
        named = ", ".join(f"rank {one['rank']} on {one['host']}" for one in seen["orphans"])
        lines.append(
            f"  without a launcher: {named} still at work; grads-ds stop"
            f" {seen['run_dir']} ends them"
        )
    for stage in stages:
        units = [
            f"{r['unit']} in {_span(r['seconds'])}"
            for r in seen["finished"]
            if str(r["unit"]).split("/")[0] == stage
        ]
        if job and job["stage"] == stage and job["outcome"] is None and holder:
            units.append(_working(job))
        elif job and job["stage"] == stage and job["outcome"] and job["outcome"]["status"]:
            units.append(
                f"ended with status {job['outcome']['status']}: {job['outcome']['sentence']}"
            )
        lines.append(f"  {stage:<9} {'; '.join(units) or ('done' if stage in done else '-')}")
    if seen["checkpoint"]:
        mark = seen["checkpoint"]
        lines.append(
            f"  last checkpoint: step {mark['step']}, {_span(mark['age_seconds'])} ago,"
            f" {mark['path']}"
        )
    return printable("\n".join(lines))


def _working(job: dict[str, Any]) -> str:
    parts = [str(job["doing"] or "starting")]
    if job["total"]:
        parts.append(
            f"step {job['done']} of {job['total']} ({100 * job['done'] / job['total']:.0f} %)"
        )
    if job["eta_seconds"] is not None:
        parts.append(f"{_span(job['eta_seconds'])} left")
    parts.append(f"{job['states'].get('running', 0)} of {job['ranks']} ranks run")
    if job["slowest"] and job["slowest"]["lag_seconds"] >= 1:
        parts.append(
            f"rank {job['slowest']['rank']} on {job['slowest']['host']} lags by"
            f" {job['slowest']['lag_seconds']:.0f} s"
        )
    parts += [one["sentence"] for one in job["slow"]]
    parts += [f"rank {r['rank']} on {r['host']} silent for {r['seconds']} s" for r in job["silent"]]
    return ", ".join(parts)


def _span(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 120:
        return f"{seconds} s"
    return (
        f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
        if seconds >= 3600
        else f"{seconds // 60} min"
    )
