"""Watching a job through its folder: who has started, who advances, who has ended, and what to do
about it.

Reads the ranks' `rank<N>.json` and rank 0's log; writes `control.json`, by which every supervisor
on every host is told to stop or to take stacks. Clocks of different hosts are never compared: a
rank is silent when its record has not changed for a while by this host's clock.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grads_ds.launcher import stacks, stragglers
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job_outcome import HANG, NOT_STARTED, STOPPED, Outcome, judge
from grads_ds.launcher.records import UNSEEN, publish
from grads_ds.launcher.reporting import Reporter

POLL_SECONDS = 0.1
STACK_SECONDS = 3.0
RUNNER_SECONDS = 10.0  # how long a runner gets to notice that its processes have ended
_ENDED = ("done", "failed", "stopped")


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which something is a fault."""

    start: float = 180.0  # until every rank's supervisor has reported
    lost: float = 30.0  # a supervisor's silence
    hang: float = 1800.0  # a rank without progress (torch's own limit for a collective, too)
    grace: float = 20.0  # from SIGTERM to SIGKILL
    # over which a rank's own work is summed; two such windows make a straggler
    straggler_window: float = 30.0
    # after the first trouble, for the others to report theirs: one of them may be the cause
    settle: float = 4.0


@dataclass
class Seen:
    """What the launcher knows of one rank."""

    rank: int
    host: str
    record: dict[str, Any] = field(default_factory=dict)
    heard: float = 0.0  # when the record last changed
    advanced: float = 0.0  # when the progress in it last changed

    @property
    def ended(self) -> bool:
        """Whether its supervisor has reported the end."""
        return self.record.get("state") in _ENDED


class JobMonitor:
    """The launcher's side of a job folder."""

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[Host],
        limits: Timeouts,
        show: Callable[[str], None],
        reporter: Reporter,
    ):
        self.folder, self.limits, self.show, self.reporter = folder, limits, show, reporter
        now = time.monotonic()
        names = [host.name for host in hosts for _ in range(host.slots)]
        self.ranks = [Seen(rank, name, heard=now, advanced=now) for rank, name in enumerate(names)]
        self.control: dict[str, Any] = {"beat": 0, "dump": 0, "stop": None}
        self.interrupted: int | None = None  # the signal this process got
        self.order: list[int] = []  # ranks in the order in which they ended
        self.slow: dict[int, stragglers.Straggler] = {}
        self._log_position = 0
        self._told = 0.0
        # there from the start: a network file system remembers absent names for a while
        for seen in self.ranks:
            self._record_path(seen.rank).write_text("{}")
        self.tell()

    def _record_path(self, rank: int) -> Path:
        return self.folder / f"rank{rank:05d}.json"

    def tell(self, **changes: Any) -> None:
        """Publish the control file, which also says that the launcher lives."""
        self.control |= changes
        self.control["beat"] += 1
        self._told = time.monotonic()
        publish(self.folder / "control.json", self.control)

    def look(self) -> None:
        """Read every rank's record once and pass on what rank 0 printed."""
        now = time.monotonic()
        for seen in self.ranks:
            if seen.ended:
                continue
            record: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(self._record_path(seen.rank).read_text())
            if not record or record == seen.record:
                continue
            seen.heard = now
            if any(record.get(key) != seen.record.get(key) for key in ("progress", "state")):
                seen.advanced = now
            seen.record = record
            if record["state"] in _ENDED:
                self.order.append(seen.rank)
        self._pass_on_log()
        if now - self._told > 1.0:
            self.tell()
            self._name_slow_ranks()

    def _name_slow_ranks(self) -> None:
        """Say which ranks have become slow, once, and which keep up again."""
        found = stragglers.find_stragglers([seen.record for seen in self.ranks])
        if found is None:
            return
        slow = {one.rank: one for one in found}
        for rank in slow.keys() - self.slow.keys():
            self.show(f"\ngrads-ds: {slow[rank].sentence}\n")
            self.reporter.note("slow", **asdict(slow[rank]))
        for rank in self.slow.keys() - slow.keys():
            if not self.ranks[rank].ended:
                self.show(f"\ngrads-ds: rank {rank} on {self.slow[rank].host} is slow no more\n")
                self.reporter.note("slow no more", rank=rank, host=self.slow[rank].host)
        self.slow = slow

    def _pass_on_log(self) -> None:
        with contextlib.suppress(OSError), open(self.folder / "rank00000.log", "rb") as file:
            file.seek(self._log_position)
            text = file.read()
            self._log_position += len(text)
            if text:
                self.show(text.decode(errors="replace"))

    def follow(self, processes: Sequence[subprocess.Popen[bytes]]) -> Outcome:
        """Stay until the job is over, one way or another; afterwards no rank is left that this host
        could reach.
        """
        began = time.monotonic()
        outcome = None
        while outcome is None:
            self.look()
            if all(seen.ended for seen in self.ranks) or self.interrupted:
                break
            self.reporter.progress()
            outcome = self._trouble(began, all(process.poll() is not None for process in processes))
            time.sleep(POLL_SECONDS)
        if self.interrupted:
            outcome = Outcome(128 + self.interrupted, f"stopped by signal {self.interrupted}")
        self._stop_all(outcome.sentence if outcome else "over")
        self.look()
        return outcome or judge(self._in_order(), self._silent(0.0))

    def _trouble(self, began: float, runner_gone: bool) -> Outcome | None:
        """What is wrong now, if anything: a rank that did not start, failed, fell silent or does
        not advance.
        """
        now = time.monotonic()
        running = [seen for seen in self.ranks if not seen.ended]
        absent = [seen for seen in running if not seen.record]
        if absent and (
            now - began > self.limits.start or runner_gone or UNSEEN in self._runner_said()
        ):
            return self._settled(lambda: self._not_started(absent))
        if any(seen.record["state"] != "done" for seen in self.ranks if seen.ended):
            return self._settled(lambda: self._judged(absent))
        silent = self._silent(self.limits.settle if runner_gone else self.limits.lost)
        if silent:
            return judge(self._in_order(), silent)
        stuck = [seen for seen in running if seen.record and now - seen.advanced > self.limits.hang]
        return self._hang() if stuck else None

    def _settled(self, decide: Callable[[], Outcome]) -> Outcome:
        """Wait for the others' news, then decide."""
        deadline = time.monotonic() + self.limits.settle
        while (
            time.monotonic() < deadline
            and not all(seen.ended for seen in self.ranks)
            and not self.interrupted
        ):
            time.sleep(POLL_SECONDS)
            self.look()
        return decide()

    def _judged(self, absent: list[Seen]) -> Outcome:
        outcome = judge(self._in_order(), self._silent(self.limits.settle * 0.7))
        # a runner that cannot start some ranks stops the others
        missing = outcome.status == STOPPED and any(not seen.record for seen in absent)
        return self._not_started(absent) if missing else outcome

    def _not_started(self, absent: list[Seen]) -> Outcome:
        absent = [seen for seen in absent if not seen.record]
        if not absent:
            return judge(self._in_order(), self._silent(self.limits.settle * 0.7))
        hosts = list(dict.fromkeys(seen.host for seen in absent))
        ranks = ", ".join(str(seen.rank) for seen in absent[:8]) + (
            ", ..." if len(absent) > 8 else ""
        )
        sentence = (
            f"the runner did not start rank{'s' if len(absent) > 1 else ''} {ranks} on"
            f" {', '.join(hosts)}"
        )
        return Outcome(
            NOT_STARTED,
            sentence,
            "\n".join(self._runner_said().splitlines()[-15:]),
            absent[0].rank,
            hosts[0],
        )

    def _runner_said(self) -> str:
        with contextlib.suppress(OSError):
            return (self.folder / "runner.log").read_text(errors="replace").strip()
        return ""

    def _silent(self, seconds: float) -> set[int]:
        """Ranks whose supervisors have said nothing for so long."""
        now = time.monotonic()
        return {
            seen.rank
            for seen in self.ranks
            if seen.record and not seen.ended and now - seen.heard > seconds
        }

    def _hang(self) -> Outcome:
        """Take every rank's stack and say it in one sentence."""
        self.tell(dump=self.control["dump"] + 1)
        deadline = time.monotonic() + STACK_SECONDS
        while time.monotonic() < deadline and not self.interrupted:
            time.sleep(POLL_SECONDS)
            self.look()
        texts, hosts = {}, {}
        for seen in self.ranks:
            if not seen.ended:
                with contextlib.suppress(OSError):
                    texts[seen.rank] = (self.folder / f"rank{seen.rank:05d}.stack").read_text(
                        errors="replace"
                    )
                hosts[seen.rank] = str(seen.record.get("host", seen.host))
        where = stacks.sentence(texts, hosts)
        return Outcome(
            HANG,
            f"no progress for {self.limits.hang:.0f} s: {where} (stacks:"
            f" {self.folder}/rank*.stack)",
        )

    def _stop_all(self, why: str) -> None:
        """Have every supervisor end its rank, and wait until they have; the silent ones are past
        being told.
        """
        if all(seen.ended for seen in self.ranks):
            return
        self.tell(stop=why)
        deadline = time.monotonic() + self.limits.grace + 5.0
        while time.monotonic() < deadline:
            lost = self._silent(self.limits.settle)
            if all(seen.ended or seen.rank in lost or not seen.record for seen in self.ranks):
                break
            time.sleep(POLL_SECONDS)
            self.look()

    def _in_order(self) -> list[dict[str, Any]]:
        """The records, those that ended first in front."""
        rest = [seen.rank for seen in self.ranks if seen.rank not in self.order]
        return [
            {"rank": rank, "wanted_host": self.ranks[rank].host} | self.ranks[rank].record
            for rank in [*self.order, *rest]
        ]
