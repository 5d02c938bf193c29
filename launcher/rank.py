"""The supervisor of one rank: starts it, keeps its log, tells the launcher how it fares, and ends
it when told to.

    python launcher/rank.py JOB_FOLDER          (started on every slot by deepspeed, mpirun, srun,
                                                ... or the launcher itself)

Reads `job.json`, `environment.json` and, again and again, `control.json` in the job folder, which
all hosts share. Writes `rank<N>.json` (host, pids, state, last progress, how it ended),
`rank<N>.log` (the rank's output) and `rank<N>.stack` (its Python stacks, when asked). Always exits
0 once the record is written: what happened stands in the record, and a runner that saw a failure
would kill the other ranks its own way. Standard library only and run by path, so that it starts in
milliseconds wherever a Python is, and can say what is missing there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # started by its path: the folder to import from is the one above the package
    sys.path[0] = str(Path(__file__).absolute().parents[2])

from grads_ds.config.errors import UserError
from grads_ds.launcher.job_outcome import WRONG_INPUT
from grads_ds.launcher.process_memory import memory_of
from grads_ds.launcher.rank_environment import environment_of, take
from grads_ds.launcher.rank_log import RankLog
from grads_ds.launcher.records import UNSEEN, publish, read
from grads_ds.launcher.rendezvous import DOOR_VARIABLE
from grads_ds.launcher.runners import rank_of
from grads_ds.run_dir.processes import die_with_parent, oom_kills, this_process

BEAT_SECONDS = 1.0
BLOCKED_SECONDS = 1.0  # a round of the loop that took longer was held up itself
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Supervisor:
    """One rank's process and its record."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.job = json.loads((folder / "job.json").read_text())
        slots = [slots for _, slots in self.job["hosts"]]
        self.rank, self.local_rank, self.world = rank_of(dict(os.environ), slots)
        self.stem = folder / f"rank{self.rank:05d}"
        self.log = RankLog(self.stem.with_suffix(".log"), int(self.job["log_bytes"]))
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping: str | None = None  # why, once somebody asked
        self.by_launcher = False  # it was the launcher that asked
        self.orphaned = False  # the launcher or its runner is gone
        self.stopped_since, self.grace = 0.0, float(self.job["grace_seconds"])
        self.pending = b""
        self.ooms = oom_kills()
        self.record: dict[str, Any] = {
            "rank": self.rank,
            "local_rank": self.local_rank,
            **{"supervisor" if k == "pid" else k: v for k, v in this_process().items()},
            "state": "starting",
            "started": time.time(),
            "beats": 0,
        }

    def run(self) -> None:
        """Start the rank and stay until it has ended."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's word stands
                signal.signal(number, self._on_signal)
        self.tell()
        try:
            if self._told_to_stop():  # the launcher gave up before this host had started
                self.record |= {"state": "stopped", "reason": "told to stop before it started"}
            else:
                self._start()
                self._watch()
        except UserError as error:  # before the rank was there
            self.record |= {"state": "failed", "status": WRONG_INPUT, "ended": time.time()}
            self.record |= {"error": str(error), "error_status": WRONG_INPUT}
        except Exception as error:
            self._end()
            self.record |= {"state": "failed", "status": 1, "ended": time.time()}
            self.record.setdefault(
                "error", f"the rank's supervisor failed: {type(error).__name__}: {error}"
            )
        if self.orphaned:  # nobody else removes what may hold tokens
            (self.folder / "environment.json").unlink(missing_ok=True)
        self.tell()

    def tell(self) -> None:
        """Publish the record."""
        self.record["beats"] += 1
        if self.process is not None:
            self.record["memory"] = memory_of(self.process.pid) or self.record.get("memory", {})
        self.record["time"] = time.time()
        publish(self.stem.with_suffix(".json"), self.record)

    # ---- start -----------------------------------------------------------------------------------

    def _start(self) -> None:
        environment, notes = environment_of(
            self.folder,
            self.job,
            (self.rank, self.local_rank, self.world),
            take(self.folder),
            self._told_to_stop,
        )
        self.record["notes"] = notes
        wanted = sum(slots for _, slots in self.job["hosts"])
        if self.world != wanted:
            raise RuntimeError(f"the runner started {self.world} ranks, wanted {wanted}")
        beats, their_beats = os.pipe()
        os.set_blocking(beats, False)
        os.set_blocking(their_beats, False)  # a rank never waits for its supervisor
        doors = [int(environment[DOOR_VARIABLE])] if environment[DOOR_VARIABLE] else []
        with (
            open(self.stem.with_suffix(".stack"), "ab") as stack,
            open(self.stem.with_suffix(".log"), "ab") as log,
        ):
            environment["GRADS_DS_SUPERVISOR"] = (
                f"{their_beats},{stack.fileno()},{self.job['pace_seconds']}"
            )
            self.process = subprocess.Popen(
                self.job["command"],
                cwd=self.job["cwd"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(their_beats, stack.fileno(), *doors),
                preexec_fn=die_with_parent,  # noqa: PLW1509  (one thread)
            )
        for handed in (their_beats, *doors):  # a rank that is gone holds no port
            os.close(handed)
        self.beats = beats
        self.record |= {"state": "running", "pid": self.process.pid}
        self.tell()

    # ---- watch -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self.process is not None
        parent, published, beaten, dumps = os.getppid(), 0.0, time.monotonic(), 0
        before = beaten
        control: dict[str, Any] = {}
        while (status := self.process.poll()) is None:
            now = time.monotonic()
            # this process was held up, by a file system that stalls: that is no silence of others
            held_up = now - before if now - before > BLOCKED_SECONDS else 0.0
            beaten, self.stopped_since = beaten + held_up, self.stopped_since + held_up
            before = now
            self._listen()
            if now - published >= BEAT_SECONDS:
                published = now
                self.tell()
                self.log.keep_small(self.process.pid)
                latest = read(self.folder / "control.json")
                if latest and latest.get("beat") != control.get("beat"):
                    control, beaten = latest, time.monotonic()
                if control.get("stop"):
                    self.grace = float(control.get("grace", self.grace))
                    self._ask_to_stop(control["stop"], by_launcher=True)
                if control.get("dump", 0) > dumps:
                    dumps = control["dump"]
                    self.process.send_signal(signal.SIGUSR2)
            # nobody is left who would ask: the rank must not outlive its job
            if os.getppid() != parent:
                self.orphaned = True
                self._ask_to_stop("the runner that started this rank is gone", by_launcher=True)
            if now - beaten > self.job["silent_seconds"]:
                self.orphaned, seconds = True, self.job["silent_seconds"]
                self._ask_to_stop(f"the launcher has been silent for {seconds:.0f} s", True)
            if self.stopping and now > self.stopped_since + self.grace:
                self._signal(signal.SIGKILL)
            time.sleep(0.05)
        # how it ended
        self._listen()
        self._end()
        told = (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGUSR1)
        if status in told and not self.stopping:
            self.stopping = f"SIGTERM or SIGUSR1 to the rank itself on {socket.gethostname()}"
        state = "done" if status == 0 else "stopped" if self.stopping else "failed"
        self.record |= {"state": state, "status": status, "ended": time.time()}
        if self.stopping:
            self.record |= {"reason": self.stopping, "by_launcher": self.by_launcher}
        if status == -signal.SIGKILL and oom_kills() > self.ooms:
            self.record["oom"] = True

    def _listen(self) -> None:
        """Take in what the rank wrote: one JSON object a line, progress or its own error."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.beats, 65536):
                self.pending += chunk
        *lines, self.pending = self.pending.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                self.record |= json.loads(line)

    def _on_signal(self, number: int, frame: object) -> None:
        self.grace = float(self.job["checkpoint_seconds"])
        self._ask_to_stop(f"{signal.Signals(number).name} on {socket.gethostname()}")

    def _told_to_stop(self) -> bool:
        return bool(self.stopping or read(self.folder / "control.json").get("stop"))

    def _ask_to_stop(self, why: str, by_launcher: bool = False) -> None:
        """SIGTERM to the rank, once; SIGKILL follows after the grace. The launcher reads
        "stopping", and has the other ranks stop too.
        """
        if not self.stopping:
            self.stopping, self.by_launcher = why, by_launcher
            self.stopped_since = time.monotonic()
            if not by_launcher:
                self.record["stopping"] = why
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def _end(self) -> None:
        """Nothing of the rank's process group outlives it."""
        self._signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def main(folder: Path) -> int:
    """Supervise one rank; 0 once its record is written, 1 when the job folder is not visible."""
    if not (folder / "job.json").is_file():
        print(
            f"grads-ds: {socket.gethostname()} {UNSEEN} {folder}; wanted the run directory on a"
            " file system that all hosts share; put run_dir on one",
            file=sys.stderr,
        )
        return 1
    try:
        Supervisor(folder).run()
    except OSError as error:  # its record is the only word it has besides this one
        print(
            f"grads-ds: {socket.gethostname()} cannot write in {folder}: {error.strerror or error};"
            " wanted the run directory writable on every host; let this user write there",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
