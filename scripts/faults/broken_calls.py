"""A piece of work on a file system that is broken on purpose: in a process forked from this warmed
one, with storage_shim.c preloaded and armed.

Needs a C compiler and Linux. A script calls `preload` before it imports anything large.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SHIM = Path(tempfile.gettempdir()) / f"storage_shim.{os.getuid()}.so"
COUNT, KILL, FAIL, FULL, READS = range(5)  # modes of the shim
NEVER = 2**40  # a call that does not come: with READS, calls are counted and none fails
SECONDS = 120  # work that takes longer is stuck
STUCK = "STUCK"


def build_shim() -> Path:
    """Compile the shim, unless that was done since it changed."""
    source = Path(__file__).with_name("storage_shim.c")
    if not SHIM.exists() or SHIM.stat().st_mtime < source.stat().st_mtime:
        aside = SHIM.with_suffix(f".{os.getpid()}")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(aside), str(source), "-ldl"]
        subprocess.run(command, check=True)
        aside.replace(SHIM)
    return SHIM


def preload() -> None:
    """Start this script again with the shim preloaded, unless that was done."""
    if os.environ.get("LD_PRELOAD") == str(SHIM):
        return
    build_shim()
    environment = os.environ | {
        "LD_PRELOAD": str(SHIM),
        "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(Path(tempfile.gettempdir()) / "torture-cache"),
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the work, in memory where there is one: a sync there costs nothing."""
    memory = "/dev/shm"
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


def armed(folder: Path, at: int, mode: int, number: int = 0) -> Callable[[], None]:
    """What arms the shim in the forked process: below `folder`, at the call `at`."""
    library = ctypes.CDLL(str(SHIM))
    return lambda: library.storage_shim_arm(str(folder).encode(), ctypes.c_long(at), mode, number)


def attempt(
    work: Callable[[], int], arm: Callable[[], None] | None = None, said: Path | None = None
) -> int | str:
    """Exit status of `work` in a forked process, "killed", or STUCK; what it prints goes to the
    file `said`.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            sink = os.open(said or os.environ.get("TORTURE_LOG", os.devnull), flags)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            if arm is not None:
                arm()
            status = work()
        finally:
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            return "killed" if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return STUCK


def calls_of(work: Callable[[], int], folder: Path, mode: int) -> int:
    """How many calls of a kind (COUNT: that change files, READS) `work` makes below `folder` when
    nothing fails. The work is done afterwards.
    """
    count = folder.with_name("count")

    def counted() -> int:
        library = ctypes.CDLL(str(SHIM))
        library.storage_shim_seen.restype = ctypes.c_long
        leave = os._exit  # which a rank calls by itself

        def report(status: int) -> None:
            count.write_text(str(library.storage_shim_seen()))
            leave(status)

        os._exit = report  # type: ignore[assignment]
        return work()

    status = attempt(counted, armed(folder, NEVER, mode))
    assert status == 0, status
    return int(count.read_text())
