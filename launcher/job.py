"""One distributed stage as a job: a folder, a supervisor for every rank, one readable stream, and
the truth about the end.

Writes `logs/<stage>/<time>/` (the job folder: what was started, every rank's log, record and
stacks) and `logs/<stage>.log` (what was shown); launcher/reporting.py adds lines for machines. The
environment travels in a file of mode 0600 that is removed when the job is over. No torch import.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.launcher import backends, rank_log
from grads_ds.launcher.environment import (
    for_runner,
    forwarded,
    of_this_kind_of_machine,
    write_private,
)
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job_outcome import Outcome
from grads_ds.launcher.records import publish
from grads_ds.launcher.rendezvous import INTERFACES
from grads_ds.launcher.reporting import Reporter
from grads_ds.launcher.timeouts import Timeouts
from grads_ds.launcher.watch import RUNNER_SECONDS, JobMonitor
from grads_ds.run_dir.publish import make_folder

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Placement:
    """Where jobs run and by what means."""

    hosts: Sequence[Host]
    backend: str
    ports: tuple[int, int] = (0, 0)  # rank 0 listens on a free one of these; 0, 0: any
    limits: Timeouts = field(default_factory=Timeouts)
    ssh_port: int | None = None  # None: as ~/.ssh/config says
    master_addr: str | None = None  # where the ranks find rank 0; None: as the other hosts see it
    interface: str | None = None  # of gloo and NCCL; None: the one that leads to the other hosts

    def environment(self) -> dict[str, str]:
        """Variables by which the placement reaches the ranks."""
        interface = {name: self.interface for name in INTERFACES if self.interface}
        return of_this_kind_of_machine(self.hosts[0].slots) | interface  # type: ignore[operator]


def run_job(
    name: str, command: Sequence[str], place: Placement, log_dir: Path, shown: bool = True
) -> Outcome:
    """Run `command` on every slot, rank 0's words on the terminal if `shown`.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 end every rank before this returns; those that this process
    was started to ignore (nohup) stay ignored.

    Raises UserError when the backend cannot be used from here.
    """
    backend = backends.load(place.backend)
    if problems := backend.problems(place.hosts):
        raise UserError([f"--backend {place.backend}: {problem}" for problem in problems])
    # what the supervisors on every host will read
    folder = _new_folder(log_dir / name)
    job = describe(command, place)
    publish(folder / "job.json", job)
    # there from the start: a full disk must not keep the end from being written
    publish(folder / "outcome.json", {})
    environment = forwarded(os.environ, place.environment())
    commands = backend.commands(_backend_job(folder, place, for_runner(os.environ)))
    # what the user sees, and where it stays
    processes: list[subprocess.Popen[bytes]] = []
    with (
        # unbuffered: on a full disk, what was kept back would fail again when it is closed
        open(log_dir / f"{name}.log", "ab", buffering=0) as stream,
        open(folder / "runner.log", "ab") as runner_log,
    ):

        def note(text: str) -> None:
            with contextlib.suppress(OSError):  # a full disk is for the ranks to tell
                stream.write(text.encode(errors="replace"))

        def show(text: str) -> None:
            if shown:
                sys.stdout.write(text)
                sys.stdout.flush()
            note(text)

        started = time.strftime("%Y-%m-%d %H:%M:%S")
        note(f"--- {started} {place.backend}: {shlex.join(job['command'])}\n")
        reporter = Reporter(log_dir.parent, name, folder.name)
        reporter.note("start", ranks=sum(host.slots for host in place.hosts), backend=place.backend)
        watch = JobMonitor(folder, place.hosts, place.limits, show, reporter)
        # start, and stay until all is over
        try:
            write_private(folder / "environment.json", environment)
            with _caught_signals(watch):
                for start in commands:
                    for path, text in start.files.items():
                        path.write_text(text)
                    # sessions of their own: an interrupt reaches the ranks once, through their
                    # supervisors
                    processes.append(
                        subprocess.Popen(
                            start.arguments,
                            env=start.environment,
                            stdin=subprocess.DEVNULL,
                            stdout=runner_log,
                            stderr=runner_log,
                            start_new_session=True,
                        )
                    )
                outcome = watch.follow(processes)
            publish(folder / "outcome.json", asdict(outcome))
            reporter.note(
                "end",
                status=outcome.status,
                sentence=outcome.sentence,
                rank=outcome.rank,
                host=outcome.host,
            )
            return outcome
        finally:
            _end_runners(processes)
            (folder / "environment.json").unlink(missing_ok=True)


def describe(command: Sequence[str], place: Placement) -> dict[str, Any]:
    """What the supervisors are told in `job.json`."""
    return {
        "command": list(command),
        "cwd": os.getcwd(),
        "hosts": [[host.name, host.slots] for host in place.hosts],
        "devices": [host.devices for host in place.hosts],
        "ports": list(place.ports),
        "master_addr": place.master_addr,
        "runner_sets": backends.load(place.backend).RUNNER_SETS,
        "log_bytes": rank_log.LOG_BYTES,
        "grace_seconds": place.limits.grace,
        "checkpoint_seconds": place.limits.checkpoint,
        "pace_seconds": place.limits.straggler_window,
        "silent_seconds": (
            2
            # a launcher that says nothing for so long is gone, and its job with it
            * place.limits.lost
        ),
    }


def dry_run(name: str, command: Sequence[str], place: Placement, log_dir: Path) -> str:
    """What `run_job` would start, exactly; variables by name, without their values, which may be
    secrets.
    """
    folder = (log_dir / name / "TIME").resolve()
    commands = backends.load(place.backend).commands(_backend_job(folder, place, {}))
    lines = [
        f"{name}: {len(commands)} process{'es' if len(commands) > 1 else ''} here, by"
        f" {place.backend}"
    ]
    lines += [f"  {shlex.join(start.arguments)}" for start in commands]
    for path, text in (item for start in commands for item in start.files.items()):
        lines += [f"  {path}:", *(f"    {line}" for line in text.splitlines())]
    lines.append(f"  each supervisor then runs: {shlex.join(command)}")
    names = sorted(forwarded(os.environ, place.environment()))
    return "\n".join([*lines, f"  with {len(names)} variables: {' '.join(names)}"])


def _backend_job(folder: Path, place: Placement, environment: dict[str, str]) -> backends.Job:
    return backends.Job(folder, place.hosts, environment, place.ssh_port)


def _new_folder(parent: Path) -> Path:
    make_folder(parent)
    stamp = time.strftime("%Y-%m-%dT%H.%M.%S")
    for name in (stamp, *(f"{stamp}.{number}" for number in range(1, 100))):
        with contextlib.suppress(FileExistsError):
            (parent / name).mkdir()
            return (parent / name).resolve()
    raise FileExistsError(f"{parent}/{stamp}: a hundred jobs in one second")


@contextlib.contextmanager
def _caught_signals(watch: JobMonitor) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        watch.interrupt(number)

    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_runners(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Runners leave by themselves when their processes have ended; those that do not are killed,
    which starts no `pkill`.
    """
    deadline = time.monotonic() + RUNNER_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
