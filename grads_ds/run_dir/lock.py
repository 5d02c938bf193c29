"""Who is at work in a run directory: a lock that its holder keeps touching (lock_file.py), loses
when another start has taken it over, and gives up when somebody asks it to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from grads_ds.config.errors import StoppedBySignal, UserError
from grads_ds.run_dir import lock_file
from grads_ds.run_dir.processes import process_gone, this_process
from grads_ds.run_dir.publish import make_folder, refuse_folders

LOCK_VARIABLE = "GRADS_DS_LOCK"
_SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ABSENT_BEATS = 2  # so often a holder may not find its lock before it counts as lost


class LostLockError(Exception):
    """Another start has taken the run directory over while this process was held up."""


@contextlib.contextmanager
def lock(run_dir: Path, what: str) -> Iterator[None]:
    """Hold the run directory. Raises UserError naming the holder when somebody else is at work in
    it, and LostLockError when it was taken over meanwhile: SIGTERM has stopped the work then.
    StoppedBySignal where a signal asks for the end and nobody else heeds it.

    The lock is a file with host, process and task. A process started by the holder inherits the
    right through the environment. `request_stop` reaches the holder, as SIGTERM, on any machine.
    """
    path = run_dir / "lock.json"
    token = uuid.uuid4().hex
    if lock_file.read_holder(path).get("token") == os.environ.get(LOCK_VARIABLE, token):
        yield
        return
    try:
        make_folder(run_dir)
        refuse_folders(path, _request(run_dir))
        lock_file.take(
            path,
            {"token": token, "what": what, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            | this_process(),
        )
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"run_dir: wanted a folder to write in; found {run_dir}: {error.strerror or error}"
        ) from None
    held = _Held(path, token)
    before = os.environ.get(LOCK_VARIABLE)
    os.environ[LOCK_VARIABLE] = token
    try:
        with held.beating():
            yield
    finally:
        os.environ.pop(LOCK_VARIABLE, None)
        if before is not None:
            os.environ[LOCK_VARIABLE] = before
        if lock_file.read_holder(path).get("token") == token:
            path.unlink(missing_ok=True)
            _request(run_dir).unlink(missing_ok=True)


def lock_holder(run_dir: Path) -> dict[str, Any] | None:
    """Who is at work in the run directory (host, pid, what, since); None when nobody is, or the
    holder is gone.
    """
    path = run_dir / "lock.json"
    holder = lock_file.read_holder(path)
    shown = {key: holder.get(key) for key in ("host", "pid", "what", "since")}
    return (
        shown
        if holder and not process_gone(holder) and lock_file.age(path) <= lock_file.STALE_SECONDS
        else None
    )


def request_stop(run_dir: Path) -> dict[str, Any] | None:
    """Ask whoever holds the run directory to stop; its record, or None when nobody holds it.

    The holder finds the request within a few seconds and sends itself SIGTERM.
    """
    holder = lock_file.read_holder(run_dir / "lock.json")
    if lock_holder(run_dir) is None or "token" not in holder:
        return None
    refuse_folders(_request(run_dir))
    aside = _request(run_dir).with_suffix(f".{uuid.uuid4().hex}")
    aside.write_text(json.dumps({"token": holder["token"], "by": socket.gethostname()}))
    aside.replace(_request(run_dir))
    return holder


class _Held:
    """A lock that this process holds: touched by a thread, which stops the work when the lock is
    another's, or when somebody has asked for the end.
    """

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token
        self.lost = ""
        self.over = threading.Event()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Keep the lock for the length of a `with`."""
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            with _on_signals(self._raise_if_lost):
                yield
        finally:
            self.over.set()
            thread.join()
            self._raise_if_lost()

    def _beat(self) -> None:
        asked, absent = False, 0
        while not self.over.wait(lock_file.BEAT_SECONDS):
            holder = lock_file.read_holder(self.path)
            # a start that moved it in error puts it back at once
            absent = absent + 1 if self._is_absent() else 0
            if absent > ABSENT_BEATS or (holder and holder.get("token") != self.token):
                self.lost = lock_file.who(holder) if holder else "nobody: the lock is gone"
                os.kill(os.getpid(), signal.SIGTERM)
                return
            with contextlib.suppress(OSError):  # a file system that stalls is no loss
                os.utime(self.path)
            request = lock_file.read_holder(_request(self.path.parent))
            if request.get("token") == self.token and not asked:
                asked = True
                print(f"run_dir: asked to stop from {request.get('by')}", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)

    def _is_absent(self) -> bool:
        try:
            return not self.path.exists()
        except OSError:  # a file system that fails for a while is no loss
            return False

    def _raise_if_lost(self) -> None:
        if self.lost:
            raise LostLockError(
                f"run_dir: {self.path.parent} was taken over while this process was held up; its"
                f" holder is now {self.lost}; this one has stopped"
            )


@contextlib.contextmanager
def _on_signals(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` when SIGTERM, SIGUSR1 or SIGHUP comes, then what was to handle it; by default,
    leave in order. What is ignored (nohup) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def handler(number: int, frame: FrameType | None) -> None:
        check()
        earlier = before[number]
        if callable(earlier):
            earlier(number, frame)
        elif earlier != signal.SIG_IGN:
            status = 128 + (number if number == signal.SIGHUP else signal.SIGTERM)
            raise StoppedBySignal(f"stopped by {signal.Signals(number).name}", status)

    # SIGTERM also tells that the lock was lost: it is heeded even where it is ignored
    heeded = [n for n in _SIGNALS if n == signal.SIGTERM or before[n] != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heeded:
            if signal.getsignal(number) is handler:
                signal.signal(number, before[number])


def _request(run_dir: Path) -> Path:
    return run_dir / ".stop.json"
