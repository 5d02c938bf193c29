"""Ranks that a real launcher starts, without their imports (six seconds of a processor each): a
server that has imported what ranks need forks them. With FORK_ALL in the environment, so are all
scripts and modules that Python is started with.

Everything else is real: the launcher, its supervisors, hosts, signals, and what a rank runs. Tests
of what stands or falls with a rank's own interpreter start it themselves. DeepSpeed's launcher,
which imports torch in a process here and in one on every host, is forked as ranks are; where its
environment has no PYTHONPATH, as under our pdsh backend, by `interpreter()`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import platform
import resource
import runpy
import select
import shutil
import signal
import site
import socket
import struct
import sys
import sysconfig
import tempfile
import traceback
import venv
from pathlib import Path
from typing import Any

from tests import ranks  # whose server it is

STAND_IN = Path(__file__).with_name("forked") / "sitecustomize.py"
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_NAMESPACES = ("uts", "ipc", "net", "pid", "mnt")  # of the host where a rank was started


@functools.cache
def python_path() -> str:
    """A PYTHONPATH under which ranks are forked. The server is started once, ends with this
    process.
    """
    folder = Path(tempfile.mkdtemp(prefix="forked_ranks."))
    (folder / STAND_IN.name).symlink_to(STAND_IN)
    server = multiprocessing.get_context("forkserver").Process(target=_serve, args=(str(folder),))
    with contextlib.chdir(ranks.REPO):  # else it might seem to be at work in a test's folder
        server.start()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    while not (folder / "socket").exists():
        assert server.is_alive(), "the server of forked ranks has ended"
        select.select([], [], [], 0.01)
    return f"{folder}:{ranks.REPO}"


@functools.cache
def interpreter() -> str:
    """A Python like this one under which DeepSpeed's launcher is forked whatever its PYTHONPATH."""
    folder = python_path().partition(":")[0]
    venv.create(f"{folder}/python", symlinks=True)
    lines = [f"import site; site.addsitedir({place!r})" for place in site.getsitepackages()]
    lines.append(f"import runpy; runpy.run_path({f'{folder}/{STAND_IN.name}'!r})")
    packages = sysconfig.get_path("purelib", "venv", {"base": f"{folder}/python"})
    Path(packages, "forked.pth").write_text("\n".join(lines) + "\n")
    return f"{folder}/python/bin/python"


def _serve(folder: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who keep watch
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/socket.new")
    listener.listen(64)
    os.rename(f"{folder}/socket.new", f"{folder}/socket")
    while True:
        ready, _, _ = select.select([listener, parent.sentinel], [], [])
        if parent.sentinel in ready:
            os._exit(0)
        line, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                _keep_watch(line)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        line.close()


def _keep_watch(line: socket.socket) -> None:
    """Fork the rank that the process at the other end asks for; pass its signals on, tell it how
    the rank ended, and end the rank when it is gone.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, files = _asked(line)
    pid, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert uid == os.getuid(), f"user {uid} asks for a rank of user {os.getuid()}"
    os.sched_setaffinity(0, os.sched_getaffinity(pid))
    for limit in _LIMITS:
        resource.setrlimit(limit, resource.prlimit(pid, limit))
    _enter(pid)
    rank = os.fork()
    if rank == 0:
        line.close()
        _become(asked, files)
    for number in files:
        os.close(number)
    ended = os.pidfd_open(rank)
    while True:
        ready, _, _ = select.select([line, ended], [], [])
        if ended in ready:
            _, status = os.waitpid(rank, 0)
            line.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
            os._exit(0)
        numbers = line.recv(64)
        for number in numbers:
            os.kill(rank, number)
        if not numbers:
            with contextlib.suppress(ProcessLookupError):  # it may have no group of its own yet
                os.killpg(rank, signal.SIGKILL)
            os.kill(rank, signal.SIGKILL)
            os.waitpid(rank, 0)
            os._exit(0)


def _asked(line: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What the other end wants to be run, and its open files."""
    head, files, _, _ = socket.recv_fds(line, 8, 64)
    left, text = int.from_bytes(head, "big"), b""
    while len(text) < left:
        piece = line.recv(left - len(text))
        assert piece, "the process that asked is gone"
        text += piece
    return json.loads(text), list(files)


def _enter(pid: int) -> None:
    """The namespaces of a process: the network, name and processes of its host."""
    libc = ctypes.CDLL(None, use_errno=True)
    apart = [
        name
        for name in _NAMESPACES
        if os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    ]
    handles = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in apart]
    for name, handle in zip(apart, handles, strict=True):
        assert libc.setns(handle, 0) == 0, f"{name}: {os.strerror(ctypes.get_errno())}"
        os.close(handle)


def _become(asked: dict[str, Any], files: list[int]) -> None:
    """In the fork: the rank's place, files, signals and arguments; then run it."""
    os.setsid()
    platform._uname_cache = None  # type: ignore[attr-defined]  # the server's host
    # multiprocessing starts afresh: its files of the server are closed here
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    multiprocessing.set_start_method("fork", force=True)  # as on Linux, not the server's
    tracker = multiprocessing.resource_tracker._resource_tracker  # type: ignore[attr-defined]
    tracker._fd = tracker._pid = None
    high = [os.dup2(number, 200 + i, inheritable=False) for i, number in enumerate(files)]
    os.closerange(0, 200)
    for kept, number in zip(high, asked["files"], strict=True):
        os.dup2(kept, number)
        os.close(kept)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.executable = asked["executable"]
    sys.path[:] = [asked["cwd"], *asked["path"]]
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1) for number, mode in enumerate(("r", "w", "w"))
    )
    _set_allocator()
    status = 1
    try:
        _run(asked["words"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).absolute().parent)
        runpy.run_path(words[0], run_name="__main__")


def _set_allocator() -> None:
    """What the C library reads from the environment as a process starts."""
    libc = ctypes.CDLL(None)
    for number, name in ((-3, "MMAP_THRESHOLD_"), (-1, "TRIM_THRESHOLD_"), (-2, "TOP_PAD_")):
        if value := os.environ.get(f"MALLOC_{name}"):
            libc.mallopt(number, min(int(value), 2**31 - 1))
