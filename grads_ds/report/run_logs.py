"""What a run logged: JSON records, training curves from TensorBoard, the timings of its stages."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.errors import WRONG_PATH
from grads_ds.statistics import Floats, Ints


@dataclass(frozen=True)
class Timing:
    """A finished unit of work: its name, how long it took (None: not recorded) and when it was
    done.
    """

    unit: str
    seconds: float | None
    finished: str


def read_curve(folder: Path) -> tuple[Ints, Floats] | None:
    """(step, loss) of a folder of TensorBoard event files; of a step written twice (a resumed run)
    the later stands.
    """
    if not folder.is_dir():
        return None
    # it greets with a warning when TensorFlow is absent, which it always is here
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    try:
        events.Reload()
    except DirectoryDeletedError:  # what it makes of a file system that fails, too
        list(folder.iterdir())  # raises the system's own error
        raise
    tags = events.Tags()[SCALARS]
    tag = next((t for t in ("train/loss", "loss") if t in tags), None)
    if tag is None:
        return None
    # files in the order they were begun
    points = {event.step: event.value for event in events.Scalars(tag)}
    if not points:
        return None
    steps = np.array(sorted(points), dtype=np.int64)
    return steps, np.array([points[int(s)] for s in steps], dtype=np.float64)


def read_timings(folder: Path) -> list[Timing]:
    """The finished units, in the order they finished."""
    timings = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        record = read_json(file) or {}
        seconds = record.get("seconds")
        unit, finished = str(record.get("unit", file.stem)), str(record.get("finished", ""))
        if unit == "report":
            continue  # of the page before this one
        timings.append(
            Timing(unit, float(seconds) if isinstance(seconds, int | float) else None, finished)
        )
    return sorted(timings, key=lambda t: t.finished)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None when the file is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (*WRONG_PATH, ValueError):
        return None
    return value if isinstance(value, dict) else None
