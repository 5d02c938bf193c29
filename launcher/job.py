"""One distributed stage as a job: starts the `deepspeed` launcher, shows its output, keeps it in a log, tells the truth.

Reads the hosts; writes `logs/<stage>.log` and, when ranks fail, `logs/<stage>.errors/rank<N>.json` (each rank leaves its own
error there). DeepSpeed's launcher can answer 0 for a job that was killed, so callers trust the finished units, not this
status alone. No torch import.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.hosts import Host, visible_gpus

STOP_SECONDS = 20.0  # how long ranks get to leave after an interrupt before they are killed
# glibc hands every large tensor back to the system and the page faults eat the time: an 8M-parameter training step took
# 4.2 s without these and 1.25 s with them (2 CPU cores, 2026-11)
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Failure:
    """The first failing rank's own record."""

    rank: int
    host: str
    status: int
    error: str


def run_job(
    name: str,
    arguments: Sequence[str],
    hosts: Sequence[Host],
    hostfile: Path | None,
    log_dir: Path,
) -> tuple[int, Failure | None]:
    """Run `python -m grads_ds ARGUMENTS` on every slot of `hosts`; returns the launcher's status and the first failure.

    Without a hostfile the ranks are started on this machine. Ctrl-C and SIGTERM stop every local rank before this returns.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    errors = log_dir / f"{name}.errors"
    shutil.rmtree(errors, ignore_errors=True)
    errors.mkdir()
    command = deepspeed_command(arguments, hosts, hostfile)
    environment = os.environ | rank_environment(hosts[0].slots) | {"GRADS_DS_ERRORS": str(errors.resolve())}
    with open(log_dir / f"{name}.log", "a") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
        log.flush()
        # a process group of its own, so that an interrupt is passed on once, by us, to every rank
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        previous = {s: signal.signal(s, _raise_interrupt) for s in (signal.SIGTERM, signal.SIGHUP)}
        try:
            _show(process, log)
            status = process.wait()
        except KeyboardInterrupt:
            _stop(process)
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            _stop(process)
    failure = first_failure(errors)
    if failure is None:
        shutil.rmtree(errors, ignore_errors=True)
    return status, failure


def deepspeed_command(arguments: Sequence[str], hosts: Sequence[Host], hostfile: Path | None) -> list[str]:
    """The `deepspeed` call that runs the package's stage on the hosts."""
    if hostfile is not None:
        runner = ["deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    else:
        # what the runner itself would start here; calling it straight saves an import of deepspeed and a search for hostfiles
        slots = {hosts[0].name: list(range(hosts[0].slots))}
        world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
        runner = ["deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
        runner += [f"--master_port={_free_port()}", "--log_level=warning"]
    return [sys.executable, "-m", *runner, "--no_local_rank", "--module", "grads_ds", *arguments]


def rank_environment(ranks_here: int) -> dict[str, str]:
    """Variables every rank needs on this kind of machine, unless the user has set them."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
    wanted["PYTHONWARNINGS"] = (
        "ignore::FutureWarning"  # one line per rank and call from torch and transformers otherwise
    )
    if not visible_gpus():
        threads = str(max(1, (os.cpu_count() or 1) // ranks_here))
        wanted |= CPU_ALLOCATOR | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}
    return {key: value for key, value in wanted.items() if key not in os.environ}


def first_failure(errors: Path) -> Failure | None:
    """The earliest error a rank left behind."""
    records = []
    for file in errors.glob("rank*.json"):
        with contextlib.suppress(OSError, ValueError):
            records.append(json.loads(file.read_text()))
    if not records:
        return None
    first = min(records, key=lambda record: record["time"])
    return Failure(first["rank"], first["host"], first["status"], first["error"])


def _show(process: subprocess.Popen[bytes], log: object) -> None:
    assert process.stdout is not None
    # raw chunks, not lines: progress bars redraw with carriage returns
    while chunk := os.read(process.stdout.fileno(), 65536):
        text = chunk.decode(errors="replace")
        sys.stdout.write(text)
        sys.stdout.flush()
        log.write(text)  # type: ignore[attr-defined]
        log.flush()  # type: ignore[attr-defined]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the job's process group: politely, then for good."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            continue
        return


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
