"""Watching a job through its folder: what is wrong with it, if anything, and what to do about it.

Reads the ranks' records (rank_records.py) and rank 0's log; writes `control.json`, by which every
supervisor on every host is told to stop or to take stacks.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grads_ds.config.errors import printable
from grads_ds.launcher import stacks, stragglers
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job_outcome import DONE, HANG, NOT_STARTED, STOPPED, Outcome, judge
from grads_ds.launcher.rank_log import LogReader
from grads_ds.launcher.rank_records import RankRecords, Seen
from grads_ds.launcher.records import UNSEEN, publish
from grads_ds.launcher.reporting import Reporter
from grads_ds.launcher.timeouts import Timeouts

POLL_SECONDS = 0.1
STACK_SECONDS = 3.0
RUNNER_SECONDS = 10.0  # how long a runner gets to notice that its processes have ended
HURRIED_GRACE = 1.0  # seconds from SIGTERM to SIGKILL once a second signal came


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
        self.records = RankRecords(folder, hosts, limits.blocked)
        self.ranks = self.records.ranks
        self.control: dict[str, Any] = {"beat": 0, "dump": 0, "stop": None, "grace": limits.grace}
        self.interrupted: int | None = None  # the signal this process got
        self.hurried = False  # it got a second one
        self.slow: dict[int, stragglers.Straggler] = {}
        self._notes: Counter[str] = Counter()
        self._log = LogReader(folder / "rank00000.log")
        self._published = 0.0
        self.tell()

    def interrupt(self, number: int) -> None:
        """A signal asks this process to end; another one after it, to end at once."""
        self.hurried = self.interrupted is not None
        self.interrupted = self.interrupted or number

    def tell(self, **changes: Any) -> None:
        """Publish the control file, which also says that the launcher lives."""
        self.control |= changes
        self.control["beat"] += 1
        self._published = time.monotonic()
        publish(self.folder / "control.json", self.control)

    def look(self) -> None:
        """Read every rank's record once, pass on what rank 0 printed, and say that this process
        lives.
        """
        self.records.look()
        self._pass_on_log()
        self._pass_on_notes()
        if time.monotonic() - self._published > 1.0:
            self.tell()
            self._name_slow_ranks()
        self.records.forgive()

    def _pass_on_notes(self) -> None:
        """What supervisors say of their host's environment, each sentence once."""
        notes = Counter(note for seen in self.ranks for note in seen.record.get("notes", ()))
        settled = all(seen.record.get("state", "starting") != "starting" for seen in self.ranks)
        for note in notes.keys() - self._notes.keys() if settled else ():
            times = f" ({notes[note]} ranks)" if notes[note] > 1 else ""
            self.show(f"grads-ds: {printable(note)}{times}\n")
        if settled:
            self._notes |= notes
            # its readers have read it
            (self.folder / "environment.json").unlink(missing_ok=True)

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
        with contextlib.suppress(OSError):
            if text := self._log.new():
                # progress bars redraw their line; nothing else of it acts on the terminal
                lines = text.decode(errors="replace").split("\r")
                self.show("\r".join(printable(line) for line in lines))

    def follow(self, processes: Sequence[subprocess.Popen[bytes]]) -> Outcome:
        """Stay until the job is over, one way or another; afterwards no rank is left that this host
        could reach.
        """
        outcome = None
        while outcome is None:
            self.reporter.progress()
            self.look()
            if self.records.all_ended() or self.interrupted:
                break
            outcome = self._trouble(all(process.poll() is not None for process in processes))
            time.sleep(POLL_SECONDS)
        if self.interrupted:
            # Slurm's warning before the time limit is a request to stop like SIGTERM
            usual = self.interrupted != signal.SIGUSR1
            status = 128 + self.interrupted if usual else STOPPED
            outcome = Outcome(status, f"stopped by signal {self.interrupted}")
        asked = self.interrupted is not None and self.interrupted != signal.SIGINT
        asked |= outcome is not None and outcome.status == STOPPED
        grace = self.limits.checkpoint if asked else self.limits.grace
        self._stop_all(outcome.sentence if outcome else "over", grace)
        self.look()
        return outcome or judge(self.records.in_order(), self.records.silent(0.0))

    def _trouble(self, runner_gone: bool) -> Outcome | None:
        """What is wrong now, if anything: a rank that did not start, failed, fell silent, does not
        advance, or is being stopped.
        """
        now = time.monotonic()
        running = [seen for seen in self.ranks if not seen.ended]
        absent = [seen for seen in running if not seen.record]
        if absent and (
            now - self.records.began > self.limits.start
            or runner_gone
            or UNSEEN in self._runner_said()
        ):
            return self._settled(lambda: self._not_started(absent))
        leaving = next((seen for seen in running if seen.record.get("stopping")), None)
        if leaving:
            return self._preempted(leaving)
        if any(seen.record["state"] != "done" for seen in self.ranks if seen.ended):
            return self._settled(lambda: self._judged(absent))
        silent = self.records.silent(self.limits.settle if runner_gone else self.limits.lost)
        if silent:
            return judge(self.records.in_order(), silent)
        stuck = [seen for seen in running if seen.record and now - seen.advanced > self.limits.hang]
        return self._hang() if stuck else None

    def _preempted(self, leaving: Seen) -> Outcome:
        """One rank is being stopped on its host: the others are told at once, so that all of them
        write their checkpoint together.
        """
        reason = str(leaving.record["stopping"])
        self._stop_all(f"rank {leaving.rank}: {reason}", self.limits.checkpoint)
        outcome = judge(self.records.in_order(), self.records.silent(self.limits.settle))
        sentence = f"rank {leaving.rank} was stopped: {reason}"
        host = leaving.record.get("host", leaving.host)
        stopped = outcome.status in (DONE, STOPPED)
        return Outcome(STOPPED, sentence, "", leaving.rank, host) if stopped else outcome

    def _settled(self, decide: Callable[[], Outcome]) -> Outcome:
        """Wait for the others' news, then decide."""
        deadline = time.monotonic() + self.limits.settle
        while time.monotonic() < deadline and not self.records.all_ended() and not self.interrupted:
            time.sleep(POLL_SECONDS)
            self.look()
        return decide()

    def _judged(self, absent: list[Seen]) -> Outcome:
        outcome = judge(self.records.in_order(), self.records.silent(self.limits.settle * 0.7))
        # a runner that cannot start some ranks stops the others
        missing = outcome.status == STOPPED and any(not seen.record for seen in absent)
        return self._not_started(absent) if missing else outcome

    def _not_started(self, absent: list[Seen]) -> Outcome:
        absent = [seen for seen in absent if not seen.record]
        if not absent:
            return judge(self.records.in_order(), self.records.silent(self.limits.settle * 0.7))
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

    def _stop_all(self, why: str, grace: float) -> None:
        """Have every supervisor end its rank within `grace` seconds, and wait until they have; the
        silent ones are past being told.
        """
        if self.records.all_ended():
            return
        self.tell(stop=why, grace=grace)
        deadline = time.monotonic() + grace + 5.0
        hurried = self.hurried
        while time.monotonic() < deadline + self.records.blocked:
            if self.hurried and not hurried:
                hurried = True
                self.tell(grace=HURRIED_GRACE)
            lost = self.records.silent(self.limits.settle)
            if all(seen.ended or seen.rank in lost or not seen.record for seen in self.ranks):
                break
            time.sleep(POLL_SECONDS)
            self.look()
