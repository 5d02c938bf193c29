"""Which ranks are slow: their own work, apart from what they wait for others, takes them longer
than it takes the ranks in the middle.

Reads the ranks' records (launcher/rank.py); decides. A rank writes what its own work took in its
last two windows of some seconds (grads_ds/distributed/heartbeat.py). It is slow when in both
windows a step took it TIMES what it takes the median rank, and this costs the job SHARE of its time
at least. The median is of whole ranks: with two ranks it is the faster one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIMES = 1.5
SHARE = 0.05


@dataclass(frozen=True)
class Straggler:
    """One slow rank: seconds a step, by kind of work, in its last window, and the median rank's."""

    rank: int
    host: str
    times: float
    seconds: dict[str, float]
    median: float

    @property
    def sentence(self) -> str:
        """In words."""
        kinds = ", ".join(f"{seconds:.3g} s {kind}" for kind, seconds in self.seconds.items())
        return (
            f"rank {self.rank} on {self.host} is slow: its own work takes {self.times:.1f} times as"
            f" long as the median rank's ({kinds} a step; the median rank {self.median:.3g} s)"
        )


def find_stragglers(records: Sequence[Mapping[str, Any]]) -> list[Straggler] | None:
    """The slow ones of the running ranks that `records` tell of, the slowest first; None where they
    cannot be compared.

    That is where there is one rank only, and until all have been at the same work for two windows.
    """
    running = [record for record in records if record.get("state") == "running"]
    doing = {record.get("progress", {}).get("doing") for record in running}
    if (
        len(running) < 2
        or len(doing) > 1
        or any(len(record.get("pace", [])) < 2 for record in running)
    ):
        return None
    latest = sorted(_step(record["pace"][-1]) for record in running)
    median = latest[(len(latest) - 1) // 2]
    found = []
    for record in running:
        steps = [_step(window) for window in record["pace"]]
        lost = min(
            (step - median) * w["steps"] / w["seconds"]
            for step, w in zip(steps, record["pace"], strict=True)
        )
        if min(steps) > TIMES * median and lost > SHARE:
            window = record["pace"][-1]
            seconds = {kind: total / window["steps"] for kind, total in window["work"].items()}
            found.append(
                Straggler(
                    record["rank"],
                    str(record["host"]),
                    steps[-1] / max(median, 1e-9),
                    seconds,
                    median,
                )
            )
    return sorted(found, key=lambda one: -one.times)


def _step(window: Mapping[str, Any]) -> float:
    return float(sum(window["work"].values()) / window["steps"])
