"""A run's snapshot (job_status.py) in Prometheus' text format, for node exporter's textfile
collector.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest

_STATES = ("starting", "running", "done", "failed", "stopped")


def prometheus(seen: dict[str, Any]) -> str:
    """The metrics of one snapshot; what is not known yet is left out."""
    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}

    def gauge(name: str, help_text: str, value: float | None, **labels: Any) -> None:
        if value is None:
            return
        tags = {"run": seen["run_dir"], **labels}
        if name not in gauges:
            gauges[name] = Gauge(f"grads_ds_{name}", help_text, list(tags), registry=registry)
        # half a surrogate pair, as odd file names hold, is not UTF-8
        gauges[name].labels(
            **{k: str(v).encode(errors="replace").decode() for k, v in tags.items()}
        ).set(value)

    for record in seen["finished"]:
        took = "How long a finished unit took."
        gauge("unit_seconds", took, record["seconds"], unit=record["unit"])
    gauge("busy", "Whether somebody holds the run.", float(bool(seen["holder"])))
    gauge("orphaned_ranks", "Ranks at work without a launcher.", len(seen["orphans"]))
    if job := seen["job"]:
        stage = {"stage": job["stage"]}
        gauge("step", "Steps done of the work at hand.", job["done"], **stage)
        gauge("steps", "Steps of the work at hand.", job["total"], **stage)
        gauge("eta_seconds", "Time left of the work at hand.", job["eta_seconds"], **stage)
        gauge("steps_per_second", "Of the work at hand.", job["steps_per_second"], **stage)
        memory = job["memory"] or {}
        gauge("resident_bytes", "Of the rank that holds most.", memory.get("resident"), **stage)
        gauge("gpu_most_bytes", "Of any rank so far.", memory.get("gpu_most"), **stage)
        gauge("loss", "The training's last.", (job["losses"] or [[0, None]])[-1][1], **stage)
        gauge("ranks", "Ranks wanted.", job["ranks"], **stage)
        for state in _STATES:
            count = job["states"].get(state, 0)
            gauge("ranks_in_state", "Ranks by state.", count, **stage, state=state)
        gauge("silent_ranks", "Ranks without a sign of life.", len(job["silent"]), **stage)
        lag = job["slowest"] and job["slowest"]["lag_seconds"]
        gauge("lag_seconds", "Between the first and the last rank.", lag, **stage)
        for one in job["slow"]:
            where = {"rank": one["rank"], "host": one["host"]}
            gauge("slow_rank", "Times the median rank's own work.", one["times"], **stage, **where)
        ended = job["outcome"] and job["outcome"]["status"]
        gauge("exit_status", "How the last job ended.", ended, **stage)
    if mark := seen["checkpoint"]:
        gauge("checkpoint_age_seconds", "Since the last checkpoint.", mark["age_seconds"])
        gauge("checkpoint_step", "Step of the last checkpoint.", mark["step"])
    return generate_latest(registry).decode()
