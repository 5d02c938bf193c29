"""Whether a process that a record names still lives: by boot, pid namespace, number and start time.

Standard library only: every rank's supervisor imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from pathlib import Path
from typing import Any


def die_with_parent() -> None:
    """In a child, before exec: the kernel kills it when its parent is gone (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def this_process() -> dict[str, Any]:
    """What a record says of the process that writes it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process": process_mark(os.getpid()),
        "namespace": pid_namespace(),
    }


def _local(record: dict[str, Any]) -> bool:
    """Whether a record's process could be seen from here, if it lived. One of a system without pid
    namespaces says its host alone.
    """
    if record.get("namespace") is None:
        return record.get("host") == socket.gethostname()
    boot = str(record.get("process")).partition(":")[0]
    return boot == boot_id() and record["namespace"] == pid_namespace()


def process_gone(record: dict[str, Any]) -> bool:
    """Whether the process of a record (pid, process, namespace) has certainly ended: only where it
    could be seen from here.
    """
    if not record.get("pid") or not _local(record):
        return False
    # a host or container that came back gives the same small numbers to other processes
    mark = process_mark(record["pid"])
    return mark is None or record.get("process", mark) != mark


def process_mark(pid: int) -> str | None:
    """What tells a process from another one of the same number, before or after it (boot and start
    time); None when there is none.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{boot_id()}:{after_name[19]}" if after_name[0] not in "ZX" else None


def pid_namespace() -> str | None:
    """What tells this pid namespace from others of the same boot."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def boot_id() -> str:
    """What tells one boot of a kernel from another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def oom_kills() -> int:
    """How often this host's kernel has killed a process for lack of memory; 0 where it does not
    say.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
