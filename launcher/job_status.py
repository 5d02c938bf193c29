"""How a run is getting on, from its files alone: `snapshot` reads, the other functions put it into
words or metrics.

Reads `state/`, `lock.json`, `logs/<stage>/<time>/` and checkpoints of a run directory, from any
machine that sees it; writes nothing. Times of other hosts are compared with this one's clock, to
the second at best.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.launcher import stragglers
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
    now = time.time()
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
        "holder": lock_holder(run_dir),
        "job": _job(folders[-1], now) if folders else None,
        "checkpoint": _checkpoint(run_dir, now),
    }


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
    """Seconds until the last step at the pace since the first one; None before there is a pace."""
    done, total = progress.get("done"), progress.get("total")
    if not done or not total or done <= progress.get("first", 0):
        return None
    stragglers = (progress["time"] - progress["since"]) / (done - progress["first"])
    return round(stragglers * (total - done), 1)


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
    return "\n".join(lines)


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


def prometheus(seen: dict[str, Any]) -> str:
    """The snapshot in Prometheus' text format, for node exporter's textfile collector."""
    run, job = json.dumps(seen["run_dir"]), seen["job"]
    lines: list[str] = []

    def gauge(name: str, help_text: str, value: float | None, **labels: Any) -> None:
        if value is None:
            return
        if not any(line.startswith(f"# TYPE grads_ds_{name} ") for line in lines):
            lines.extend([f"# HELP grads_ds_{name} {help_text}", f"# TYPE grads_ds_{name} gauge"])
        tags = "".join(f",{key}={json.dumps(str(label))}" for key, label in labels.items())
        lines.append(f"grads_ds_{name}{{run={run}{tags}}} {value:g}")

    for record in seen["finished"]:
        gauge(
            "unit_seconds", "How long a finished unit took.", record["seconds"], unit=record["unit"]
        )
    gauge("busy", "Whether somebody holds the run.", float(bool(seen["holder"])))
    if job:
        stage = {"stage": job["stage"]}
        gauge("step", "Steps done of the work at hand.", job["done"], **stage)
        gauge("steps", "Steps of the work at hand.", job["total"], **stage)
        gauge("eta_seconds", "Time left of the work at hand.", job["eta_seconds"], **stage)
        gauge("ranks", "Ranks wanted.", job["ranks"], **stage)
        for state in ("starting", "running", "done", "failed", "stopped"):
            gauge(
                "ranks_in_state",
                "Ranks by state.",
                job["states"].get(state, 0),
                **stage,
                state=state,
            )
        gauge("silent_ranks", "Ranks without a sign of life.", len(job["silent"]), **stage)
        gauge(
            "lag_seconds",
            "Between the first and the last rank.",
            job["slowest"] and job["slowest"]["lag_seconds"],
            **stage,
        )
        for one in job["slow"]:
            gauge(
                "slow_rank",
                "Times the median rank's own work.",
                one["times"],
                **stage,
                rank=one["rank"],
                host=one["host"],
            )
        gauge(
            "exit_status",
            "How the last job ended.",
            job["outcome"] and job["outcome"]["status"],
            **stage,
        )
    if seen["checkpoint"]:
        gauge(
            "checkpoint_age_seconds",
            "Since the last checkpoint.",
            seen["checkpoint"]["age_seconds"],
        )
        gauge("checkpoint_step", "Step of the last checkpoint.", seen["checkpoint"]["step"])
    return "\n".join(lines) + "\n"
