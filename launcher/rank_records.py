"""What the launcher knows of the ranks, from their `rank<N>.json`: who runs, who has ended and in
which order, who is silent.

Clocks of different hosts are never compared: a rank is silent when its record has not changed for
a while by this host's clock, and time in which this process was itself held up (a file system that
stalls, SIGSTOP) does not count.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grads_ds.launcher.hosts import Host

_ENDED = ("done", "failed", "stopped")


@dataclass
class Seen:
    """What the launcher knows of one rank."""

    rank: int
    host: str
    record: dict[str, Any] = field(default_factory=dict)
    changed: float = 0.0  # when the record last changed
    advanced: float = 0.0  # when the progress in it last changed

    @property
    def ended(self) -> bool:
        """Whether its supervisor has reported the end."""
        return self.record.get("state") in _ENDED


class RankRecords:
    """All ranks of a job, as their records say."""

    def __init__(self, folder: Path, hosts: Sequence[Host], blocked_after: float):
        self.folder, self.blocked_after = folder, blocked_after
        self.began = self._looked = now = time.monotonic()
        names = [host.name for host in hosts for _ in range(host.slots)]
        self.ranks = [
            Seen(rank, name, changed=now, advanced=now) for rank, name in enumerate(names)
        ]
        self.order: list[int] = []  # ranks in the order in which they ended
        self.blocked = 0.0  # seconds in which this process was held up
        # there from the start: a network file system remembers absent names for a while
        for seen in self.ranks:
            self._path(seen.rank).write_text("{}")

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05d}.json"

    def look(self) -> None:
        """Read every rank's record once."""
        now = time.monotonic()
        for seen in self.ranks:
            if seen.ended:
                continue
            record: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(self._path(seen.rank).read_text())
            if not record or record == seen.record:
                continue
            seen.changed = now
            if any(record.get(key) != seen.record.get(key) for key in ("progress", "state")):
                seen.advanced = now
            seen.record = record
            if record["state"] in _ENDED:
                self.order.append(seen.rank)

    def forgive(self) -> None:
        """Call at the end of every round of the launcher's loop: a round that took longer than
        `blocked_after` seconds moves every waiting time forward by as much.
        """
        now = time.monotonic()
        lost = now - self._looked
        self._looked = now
        if lost > self.blocked_after:
            self.blocked += lost
            self.began = min(now, self.began + lost)
            for seen in self.ranks:
                seen.changed = min(now, seen.changed + lost)
                seen.advanced = min(now, seen.advanced + lost)

    def all_ended(self) -> bool:
        """Whether every supervisor has reported the end."""
        return all(seen.ended for seen in self.ranks)

    def silent(self, seconds: float) -> set[int]:
        """Ranks whose supervisors have said nothing for so long."""
        now = time.monotonic()
        return {
            seen.rank
            for seen in self.ranks
            if seen.record and not seen.ended and now - seen.changed > seconds
        }

    def in_order(self) -> list[dict[str, Any]]:
        """The records, those that ended first in front."""
        rest = [seen.rank for seen in self.ranks if seen.rank not in self.order]
        return [
            {"rank": rank, "wanted_host": self.ranks[rank].host} | self.ranks[rank].record
            for rank in [*self.order, *rest]
        ]
