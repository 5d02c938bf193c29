"""One start of the probe that can be struck: which processes it has, where it is, and every kind of
fault.

Used by scripts/faults/suite.py. Ends only processes that the job itself started; hosts are those of
scripts/local_cluster.sh.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LOCAL = ("rank", "all ranks", "ctrl-c", "disk full")
DISTANT = ("host gone", "link cut")
HANG_SECONDS = 4.0  # how long the operator watches a job that lost a host before ending it
CLUSTER = [str(REPO / "scripts/local_cluster.sh"), "--name", f"f{os.getpid() % 10**6}"]


class Job:
    """One start of the probe and what it has printed so far."""

    def __init__(self, folder: Path, mode: str, world: int, on_hosts: bool):
        arguments = ["--module", "grads_ds"] if on_hosts else ["-m", "grads_ds"]
        arguments += ["probe", f"{mode}.yaml"]
        if on_hosts:
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            hostfile = f"/tmp/local_cluster.{CLUSTER[-1]}/hostfile"
            command = [*CLUSTER, "exec", "1", deepspeed, "--hostfile", hostfile, *arguments]
        else:
            command = [sys.executable, *arguments, "--ranks", str(world)]
        self.log = folder / "log"
        self.started = time.monotonic()
        environment = os.environ | {
            "TQDM_MININTERVAL": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [*filter(None, [os.environ.get("PYTHONPATH")]), str(folder)]
            ),
        }
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.on_hosts = on_hosts

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def over(self) -> bool:
        return self.process.poll() is not None

    def ranks(self) -> list[int]:
        """Processes of this job that a launcher made a rank."""
        return [pid for pid in self._all() if b"\0RANK=" in b"\0" + _read(pid, "environ")]

    def _all(self) -> list[int]:
        if self.on_hosts:
            words = subprocess.run(
                [*CLUSTER, "pids"], capture_output=True, text=True
            ).stdout.split()
            return [int(word) for word in words]
        children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                stat = _read(int(entry), "stat").rpartition(b")")[2].split()
                if len(stat) > 1:
                    children.setdefault(int(stat[1]), []).append(int(entry))
        found, front = [], [self.process.pid]
        while front:
            pid = front.pop()
            found.append(pid)
            front += children.get(pid, [])
        return found

    def end(self) -> None:
        """Nothing of this job is left when this returns."""
        for pid in self.ranks() + ([] if self.over() else [self.process.pid]):
            kill(pid)
        deadline = time.monotonic() + 30
        while (not self.over() or self.ranks()) and time.monotonic() < deadline:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def stage_of(job: Job) -> str:
    """Where the job is, by what it has printed."""
    said = job.output()
    for words, stage in (
        ("each once", "merge"),
        ("recording gradient norms", "recording"),
        ("preliminary training", "training"),
    ):
        if words in said:
            return stage
    return "start-up"


def strike(fault: str, job: Job, draw: random.Random, run_dir: Path) -> None:
    """Inject the fault and wait until nothing of the job is left; the machine is whole again
    afterwards.
    """
    if fault == "rank":
        found = job.ranks()
        kill(draw.choice(found) if found else job.process.pid)
    elif fault == "all ranks":
        for pid in job.ranks() + [job.process.pid]:
            kill(pid)
    elif fault == "ctrl-c":
        job.process.send_signal(signal.SIGINT)
    elif fault == "disk full":
        filler = run_dir / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        wait(job, 20)
        job.end()
        filler.unlink()
        return
    else:
        host = str(draw.randint(1, 2))
        subprocess.run(
            [*CLUSTER, *(["kill", host] if fault == "host gone" else ["link", host, "down"])],
            check=True,
        )
        # then the operator gives up waiting: every process on every host is ended
        wait(job, HANG_SECONDS)
        for number in ("1", "2"):
            subprocess.run([*CLUSTER, "kill", number], check=True)
        job.end()
        for number in ("1", "2"):
            subprocess.run([*CLUSTER, "link", number, "up"], check=True)
            subprocess.run([*CLUSTER, "boot", number], check=True)
        # a host that was started again cannot tell that the lock's holder is dead; the operator,
        # who ended it, says so (or waits two minutes)
        (run_dir / "lock.json").unlink(missing_ok=True)
        return
    wait(job, 60)
    job.end()


def wait(job: Job, seconds: float) -> None:
    """Until the job is over, at most so long."""
    deadline = time.monotonic() + seconds
    while not job.over() and time.monotonic() < deadline:
        time.sleep(0.02)
