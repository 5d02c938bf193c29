"""A run's snapshot (job_status.py) as a few lines for people, as narrow as a terminal is. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from grads_ds.config.errors import printable

LABEL = 11  # columns of a line's first word


def status_text(seen: dict[str, Any], stages: Sequence[str], left: str = "", width: int = 0) -> str:
    """A few lines for people: who is at work, every stage, then what the job at hand does.

    Args:
        seen: the snapshot.
        stages: names in order.
        left: what is said of the time left over all stages; "" for nothing.
        width: columns that lines are wrapped at; 0 for none.
    """
    done = {str(record["unit"]).split("/")[0] for record in seen["finished"]}
    job, holder = seen["job"], seen["holder"]
    at_work = bool(job and job["outcome"] is None and holder)
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
            f"{r['unit']} in {span(r['seconds'])}"
            for r in seen["finished"]
            if str(r["unit"]).split("/")[0] == stage
        ]
        if job and job["stage"] == stage and at_work:
            units.append(_working(job))
        elif job and job["stage"] == stage and job["outcome"] and job["outcome"]["status"]:
            units.append(
                f"ended with status {job['outcome']['status']}: {job['outcome']['sentence']}"
            )
        lines.append(_line(stage, "; ".join(units) or ("done" if stage in done else "-")))
    if at_work:
        lines += [_line(label, words) for label, words in _job_lines(job) if words]
    if left and holder:
        lines.append(_line("all stages", left))
    if seen["checkpoint"]:
        mark = seen["checkpoint"]
        lines.append(
            f"  last checkpoint: step {mark['step']}, {span(mark['age_seconds'])} ago,"
            f" {mark['path']}"
        )
    if width:
        lines = [part for line in lines for part in _wrapped(line, width)]
    return printable("\n".join(lines))


def _line(label: str, words: str) -> str:
    return f"  {label:<{LABEL - 2}} {words}"


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line, max(20, width), subsequent_indent="    ", break_on_hyphens=False
    ) or [""]


def _working(job: dict[str, Any]) -> str:
    parts = [str(job["doing"] or "starting")]
    if job["total"]:
        parts.append(
            f"step {job['done']} of {job['total']} ({100 * job['done'] / job['total']:.0f} %)"
        )
    if job["eta_seconds"] is not None:
        parts.append(f"{span(job['eta_seconds'])} left")
    return ", ".join(parts)


def _job_lines(job: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, words) of what the job at hand does; "" where it is not known."""
    ranks = [f"{job['states'].get('running', 0)} of {job['ranks']} run"]
    if job["slowest"] and job["slowest"]["lag_seconds"] >= 1:
        ranks.append(
            f"rank {job['slowest']['rank']} on {job['slowest']['host']} lags by"
            f" {job['slowest']['lag_seconds']:.0f} s"
        )
    ranks += [one["sentence"] for one in job["slow"]]
    ranks += [f"rank {r['rank']} on {r['host']} silent for {r['seconds']} s" for r in job["silent"]]
    return [
        ("ranks", ", ".join(ranks)),
        ("rate", rate(job["steps_per_second"])),
        ("memory", _memory(job["memory"])),
        ("loss", _losses(job["losses"])),
    ]


def _memory(memory: dict[str, Any] | None) -> str:
    if not memory:
        return ""
    said = (
        f"{size(memory['resident'])} on rank {memory['rank']} ({memory['host']}), the most of any"
        f" now; at most {size(memory['resident_most'])} so far"
    )
    return said + (f"; GPU {size(memory['gpu_most'])} at most" if memory.get("gpu_most") else "")


def _losses(losses: list[list[float]]) -> str:
    if not losses:
        return ""
    values = " ".join(f"{loss:.3f}" for _, loss in losses)
    return f"{values} (the last at step {losses[-1][0]:.0f})"


def rate(steps_per_second: float | None) -> str:
    """Steps a second, or seconds a step where that is more than one."""
    if not steps_per_second:
        return ""
    if steps_per_second >= 1:
        return f"{steps_per_second:.1f} steps/s"
    return f"{1 / steps_per_second:.1f} s/step"


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def span(seconds: float) -> str:
    """Seconds as s, min or h and min."""
    seconds = int(seconds)
    if seconds < 120:
        return f"{seconds} s"
    return (
        f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
        if seconds >= 3600
        else f"{seconds // 60} min"
    )
