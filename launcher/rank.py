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
import ctypes
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

from grads_ds.launcher.network import free_port, interface_towards
from grads_ds.launcher.records import UNSEEN, publish, read
from grads_ds.launcher.runners import rank_of

BEAT_SECONDS = 1.0
RENDEZVOUS_SECONDS = 120.0
# what a host or a runner says about itself; everything else is as it was where the launcher was
# started
OF_THE_HOST = (
    "HOSTNAME",
    "TMPDIR",
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
)


class Supervisor:
    """One rank's process and its record."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.job = json.loads((folder / "job.json").read_text())
        slots = [slots for _, slots in self.job["hosts"]]
        self.rank, self.local_rank, self.world = rank_of(dict(os.environ), slots)
        self.stem = folder / f"rank{self.rank:05d}"
        self.process: subprocess.Popen[bytes] | None = None
        self.stopping: str | None = None  # why, once somebody asked
        self.stop_at = 0.0
        self.pending = b""
        self.ooms = oom_kills()
        self.record: dict[str, Any] = {
            "rank": self.rank,
            "local_rank": self.local_rank,
            "host": socket.gethostname(),
            "supervisor": os.getpid(),
            "state": "starting",
            "started": time.time(),
            "beats": 0,
        }

    def run(self) -> None:
        """Start the rank and stay until it has ended."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.tell()
        try:
            if self._told_to_stop():  # the launcher gave up before this host had started
                self.record |= {"state": "stopped", "reason": "told to stop before it started"}
            else:
                self._start()
                self._watch()
        except Exception as error:
            self._end()
            self.record |= {"state": "failed", "status": 1, "ended": time.time()}
            self.record.setdefault(
                "error", f"the rank's supervisor failed: {type(error).__name__}: {error}"
            )
        self.tell()

    def tell(self) -> None:
        """Publish the record."""
        self.record["beats"] += 1
        self.record["time"] = time.time()
        publish(self.stem.with_suffix(".json"), self.record)

    # ---- start -----------------------------------------------------------------------------------

    def _start(self) -> None:
        forwarded = json.loads((self.folder / "environment.json").read_text())
        here = {name: os.environ[name] for name in OF_THE_HOST if name in os.environ}
        environment = forwarded | here | self._rendezvous()
        environment |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world),
        }
        environment["GRADS_DS_JOB_FOLDER"] = str(self.folder)
        environment |= self._of_this_host()
        wanted = sum(slots for _, slots in self.job["hosts"])
        if self.world != wanted:
            raise RuntimeError(f"the runner started {self.world} ranks, wanted {wanted}")
        beats, their_beats = os.pipe()
        os.set_blocking(beats, False)
        os.set_blocking(their_beats, False)  # a rank never waits for its supervisor
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
                pass_fds=(their_beats, stack.fileno()),
                preexec_fn=_die_with_parent,  # noqa: PLW1509  (one thread)
            )
        os.close(their_beats)
        self.beats = beats
        self.record |= {"state": "running", "pid": self.process.pid}
        self.tell()

    def _of_this_host(self) -> dict[str, str]:
        """How many ranks this host has, and which of its accelerators were chosen for them."""
        before = 0
        for (_, count), devices in zip(self.job["hosts"], self.job["devices"], strict=True):
            before += count
            if self.rank < before:
                chosen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
                return {"LOCAL_WORLD_SIZE": str(count)} | chosen
        return {}

    def _rendezvous(self) -> dict[str, str]:
        """MASTER_ADDR and MASTER_PORT, agreed on through a file, and the interface that leads
        there.

        Rank 0 picks a port that is free on its host; a fixed one is taken sooner or later. Between
        hosts, gloo and NCCL are told the interface that leads to the other hosts: left alone they
        take the one the host's own name resolves to, which is loopback on many machines.
        """
        names = [name.rpartition("@")[2] for name, _ in self.job["hosts"]]
        path = self.folder / "rendezvous.json"
        if self.rank == 0:
            publish(path, {"port": free_port(*self.job["ports"])})
        deadline = time.monotonic() + RENDEZVOUS_SECONDS
        while not (found := read(path)):
            if time.monotonic() > deadline or self._told_to_stop():
                raise TimeoutError(
                    f"rank 0 on {names[0]} did not name a port within {RENDEZVOUS_SECONDS:.0f} s"
                )
            time.sleep(0.1)
        if len(names) == 1:
            return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found["port"])}
        variables = {"MASTER_ADDR": names[0], "MASTER_PORT": str(found["port"])}
        interface = interface_towards(names[1] if self.local_rank == self.rank else names[0])
        if interface:
            # the user's own choice comes with the forwarded environment and stands
            given = json.loads((self.folder / "environment.json").read_text())
            variables |= {
                k: interface for k in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if k not in given
            }
        return variables

    # ---- watch -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self.process is not None
        parent, told, heard, dumps = os.getppid(), 0.0, time.monotonic(), 0
        control: dict[str, Any] = {}
        while (status := self.process.poll()) is None:
            now = time.monotonic()
            self._listen()
            if now - told >= BEAT_SECONDS:
                told = now
                self.tell()
                latest = read(self.folder / "control.json")
                if latest and latest.get("beat") != control.get("beat"):
                    control, heard = latest, now
                if control.get("stop"):
                    self._ask_to_stop(control["stop"])
                if control.get("dump", 0) > dumps:
                    dumps = control["dump"]
                    self.process.send_signal(signal.SIGUSR1)
            if os.getppid() != parent:
                self._ask_to_stop("the runner that started this rank is gone")
            if now - heard > self.job["silent_seconds"]:
                self._ask_to_stop(
                    f"the launcher has been silent for {self.job['silent_seconds']:.0f} s"
                )
            if self.stopping and now > self.stop_at:
                self._signal(signal.SIGKILL)
            time.sleep(0.05)
        self._listen()
        self._end()
        state = "done" if status == 0 else "stopped" if self.stopping else "failed"
        self.record |= {"state": state, "status": status, "ended": time.time()}
        if self.stopping:
            self.record["reason"] = self.stopping
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
        self._ask_to_stop(f"{signal.Signals(number).name} on {socket.gethostname()}")

    def _told_to_stop(self) -> bool:
        return bool(self.stopping or read(self.folder / "control.json").get("stop"))

    def _ask_to_stop(self, why: str) -> None:
        if not self.stopping:
            self.stopping = why
            self.stop_at = time.monotonic() + float(self.job["grace_seconds"])
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


def _die_with_parent() -> None:
    """In the child, before exec: the kernel kills it when its supervisor is gone (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def oom_kills() -> int:
    """How often this host's kernel has killed a process for want of memory; 0 where it does not
    say.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


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
