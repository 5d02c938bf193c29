"""Are a host's GPUs well? What `nvidia-smi` counts and what it means for a run.

A GPU that has begun to fail often computes on: memory errors that could not be corrected since the
driver was loaded, rows of memory that wait to be remapped or could not be, clocks that are held
down by heat. Asked before every start and every restart (examine.py). Standard library only.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

# key of the fact: nvidia-smi's name of the field
FIELDS = {
    "index": "index",
    "uncorrected": "ecc.errors.uncorrected.volatile.total",
    "remap_pending": "remapped_rows.pending",
    "remap_failed": "remapped_rows.failure",
    "too_hot": "clocks_throttle_reasons.hw_thermal_slowdown",
}
_NO = ("0", "no", "not active")


def gpu_health(environment: Mapping[str, str]) -> list[dict[str, str]]:
    """`FIELDS` of every NVIDIA GPU as they are printed; empty without any, or where this driver
    knows one of the fields not.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader"]
    try:
        told = subprocess.run(
            query, capture_output=True, text=True, timeout=30, env=dict(environment)
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in told.stdout.splitlines() if told.returncode == 0]
    return [dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS)]


def ailing(fact: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(level, what was found, advice) of every GPU of a host that is not well; those that
    CUDA_VISIBLE_DEVICES leaves out are not looked at.
    """
    found = []
    visible = _visible(fact.get("visible_devices"))
    for gpu in fact.get("gpu_health", ()):
        name = f"GPU {gpu['index']}"
        if visible is not None and gpu["index"] not in visible:
            continue
        if _counts(gpu["uncorrected"]):
            found.append(
                (
                    "problem",
                    f"{name} has had {gpu['uncorrected']} memory errors that could not be"
                    " corrected: results may be wrong",
                    f"nvidia-smi -r -i {gpu['index']} when nobody uses it, or leave the host out",
                )
            )
        if _counts(gpu["remap_failed"]):
            found.append(
                (
                    "problem",
                    f"{name} could not remap rows of its memory",
                    "have it replaced; leave the host out until then",
                )
            )
        elif _counts(gpu["remap_pending"]):
            found.append(
                (
                    "warning",
                    f"{name} has rows of memory that wait to be remapped",
                    f"nvidia-smi -r -i {gpu['index']} when nobody uses it",
                )
            )
        if _counts(gpu["too_hot"]):
            found.append(("warning", f"{name} is slowed down by heat", "look at its cooling"))
    return found


def _counts(value: str) -> bool:
    """Whether a printed field says something happened; fields a GPU has not are in brackets."""
    value = value.strip().lower()
    return bool(value) and value not in _NO and value != "n/a" and not value.startswith("[")


def _visible(variable: str | None) -> Sequence[str] | None:
    """Indices that CUDA_VISIBLE_DEVICES names; None for all, also where it names them otherwise."""
    if variable is None:
        return None
    items = [item.strip() for item in variable.split(",") if item.strip()]
    return items if all(item.isdigit() for item in items) else None
