"""Who is at work in a run directory: a lock file that its holder touches every two seconds.

A holder is known to have ended where its process can be looked for (the same boot, the same pid
namespace). Elsewhere it counts as gone once its lock has not been touched while this process
watched, by this process's own clock; the clock of the file system only says how long to watch.
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
from grads_ds.run_dir.processes import process_gone, this_process

LOCK_BEAT_SECONDS = 2.0
# a lock that looks as old as this, and is not touched for five beats, has no holder
LOCK_STALE_SECONDS = 120.0
WATCHED_BEATS = 5
LOCK_VARIABLE = "GRADS_DS_LOCK"


class LostLockError(Exception):
    """Another start has taken the run directory over while this process was held up."""


@contextlib.contextmanager
def lock(run_dir: Path, what: str) -> Iterator[None]:
    """Hold the run directory. Raises UserError naming the holder when somebody else is at work in
    it, and LostLockError when it was taken over meanwhile: SIGTERM has stopped the work then.

    The lock is a file with host, process and task. A process started by the holder inherits the
    right through the environment. `request_stop` reaches the holder, as SIGTERM, on any machine.
    """
    path = run_dir / "lock.json"
    token = uuid.uuid4().hex
    if _holder(path).get("token") == os.environ.get(LOCK_VARIABLE, token):
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _take(
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
        if _holder(path).get("token") == token:
            path.unlink(missing_ok=True)
            _request(run_dir).unlink(missing_ok=True)


def lock_holder(run_dir: Path) -> dict[str, Any] | None:
    """Who is at work in the run directory (host, pid, what, since); None when nobody is, or the
    holder is gone.
    """
    path = run_dir / "lock.json"
    holder = _holder(path)
    shown = {key: holder.get(key) for key in ("host", "pid", "what", "since")}
    return (
        shown if holder and not process_gone(holder) and _age(path) <= LOCK_STALE_SECONDS else None
    )


def request_stop(run_dir: Path) -> dict[str, Any] | None:
    """Ask whoever holds the run directory to stop; its record, or None when nobody holds it.

    The holder finds the request within a few seconds and sends itself SIGTERM.
    """
    holder = _holder(run_dir / "lock.json")
    if lock_holder(run_dir) is None:
        return None
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
            with _on_sigterm(self._raise_if_lost):
                yield
        finally:
            self.over.set()
            thread.join()
            self._raise_if_lost()

    def _beat(self) -> None:
        asked = False
        while not self.over.wait(LOCK_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file system that stalls is no loss
                holder = json.loads(self.path.read_text()) if self.path.exists() else {}
                if holder.get("token") != self.token:
                    self.lost = _who(holder) if holder else "nobody: the file is gone"
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.utime(self.path)
                request = _holder(_request(self.path.parent))
                if request.get("token") == self.token and not asked:
                    asked = True
                    print(f"run_dir: asked to stop from {request.get('by')}", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)

    def _raise_if_lost(self) -> None:
        if self.lost:
            raise LostLockError(
                f"run_dir: {self.path.parent} was taken over while this process was held up; its"
                f" holder is now {self.lost}; this one has stopped"
            )


@contextlib.contextmanager
def _on_sigterm(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` when SIGTERM comes, then what was to handle it; by default, leave in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def handler(number: int, frame: FrameType | None) -> None:
        check()
        if callable(before):
            before(number, frame)
        elif before != signal.SIG_IGN:
            raise StoppedBySignal(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is handler:
            signal.signal(signal.SIGTERM, before)


def _request(run_dir: Path) -> Path:
    return run_dir / ".stop.json"


def _take(path: Path, record: dict[str, Any]) -> None:
    """Make the lock ours: by a link that only one start can make, once the old one is moved away
    by a rename that only one start can do.
    """
    aside = path.with_name(f".{path.name}.{record['token']}.tmp")
    try:
        # whole before it is a lock: a full disk or a kill leaves none without a holder
        aside.write_text(json.dumps(record))
        for _ in range(3):
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
                if _holder(path).get("token") == record["token"]:
                    return
                continue
            holder = _holder(path)
            how = _whyprocess_gone(path, holder, aside)
            if how is None:
                raise UserError(
                    f"run_dir: {path.parent} is in use by {_who(holder)}; wait for it or stop it:"
                    f" grads-ds stop {path.parent}"
                )
            if _move_away(path, holder, record["token"]):
                print(
                    f"run_dir: {path.parent} was in use by {_who(holder)}, {how}: its lock is"
                    " taken over",
                    file=sys.stderr,
                )
    finally:
        aside.unlink(missing_ok=True)
    raise UserError(
        f"run_dir: {path} was taken by another process three times; is another start of this run"
        " under way?"
    )


def _move_away(path: Path, holder: dict[str, Any], token: str) -> bool:
    """Move the old lock away; whether it was the one that was looked at. Another start's new lock
    goes back.
    """
    old = path.with_name(f".{path.name}.{token}.old")
    try:
        path.rename(old)
    except FileNotFoundError:
        return False  # another start was quicker
    same = _holder(old).get("token") == holder.get("token")
    if not same:
        with contextlib.suppress(FileExistsError):
            os.link(old, path)
    old.unlink()
    return same


def _whyprocess_gone(path: Path, holder: dict[str, Any], probe: Path) -> str | None:
    """Why the lock has no holder any more, in words; None while it may have one.

    A lock that looks old by the file system's clock is watched for some beats, one from the future
    (clocks that differ) for as long as a stale one: only what is not touched meanwhile is stale.
    """
    if process_gone(holder) or not path.exists():
        return "which has ended"
    age = _age(path, probe)
    if -LOCK_BEAT_SECONDS <= age <= LOCK_STALE_SECONDS:
        return None
    watched = WATCHED_BEATS * LOCK_BEAT_SECONDS if age > 0 else LOCK_STALE_SECONDS
    print(
        f"run_dir: watching the lock of {_who(holder)} for {watched:.0f} s: is it touched?",
        file=sys.stderr,
        flush=True,
    )
    first, deadline = _seen(path), time.monotonic() + watched
    while time.monotonic() < deadline:
        time.sleep(min(0.5, LOCK_BEAT_SECONDS))
        if _seen(path) != first:
            return None
    return f"silent for {max(age, watched):.0f} s"


def _seen(path: Path) -> tuple[object, ...]:
    with contextlib.suppress(OSError):
        return _holder(path).get("token"), path.stat().st_mtime_ns
    return ()


def _who(holder: dict[str, Any]) -> str:
    return (
        f"{holder.get('what')} (pid {holder.get('pid')} on {holder.get('host')}, since"
        f" {holder.get('since')})"
    )


def _holder(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _age(path: Path, probe: Path | None = None) -> float:
    """Seconds since the lock was touched, by the clock of the file system where `probe` is a file
    just written; endless when there is no lock.
    """
    try:
        if probe is not None:
            os.utime(probe)
        now = probe.stat().st_mtime if probe is not None else time.time()
        return now - path.stat().st_mtime
    except OSError:
        return float("inf")
