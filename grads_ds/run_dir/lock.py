"""Who is at work in a run directory: a lock file that its holder touches every few seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError

# the holder touches its lock every few seconds; a lock this old has no holder
LOCK_STALE_SECONDS = 120.0


LOCK_BEAT_SECONDS = 5.0


LOCK_VARIABLE = "GRADS_DS_LOCK"


@contextlib.contextmanager
def lock(run_dir: Path, what: str) -> Iterator[None]:
    """Hold the run directory. Raises UserError naming the holder when somebody else is at work in
    it.

    The lock is a file with host, pid and task, touched every few seconds; one whose holder is dead
    (same host) or silent for two minutes (any host) is taken over. A process started by the holder
    inherits the right through the environment.
    """
    path = run_dir / "lock.json"
    token = uuid.uuid4().hex
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if _holder(path).get("token") == os.environ.get(LOCK_VARIABLE, token):
            yield
            return
        _take(
            path,
            {
                "token": token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process": _process(os.getpid()),
                "what": what,
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
        )
    except OSError as error:
        raise UserError(
            f"run_dir: wanted a folder to write in; found {run_dir}: {error.strerror or error}"
        ) from None
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, token, stop), daemon=True)
    beat.start()
    before = os.environ.get(LOCK_VARIABLE)
    os.environ[LOCK_VARIABLE] = token
    try:
        yield
    finally:
        stop.set()
        beat.join()
        os.environ.pop(LOCK_VARIABLE, None)
        if before is not None:
            os.environ[LOCK_VARIABLE] = before
        if _holder(path).get("token") == token:
            path.unlink(missing_ok=True)


def lock_holder(run_dir: Path) -> dict[str, Any] | None:
    """Who is at work in the run directory (host, pid, what, since); None when nobody is, or the
    holder is gone.
    """
    holder = _holder(run_dir / "lock.json")
    return (
        {key: holder.get(key) for key in ("host", "pid", "what", "since")}
        if _alive(run_dir / "lock.json", holder)
        else None
    )


def _take(path: Path, record: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{record['token']}.tmp")
    try:
        # whole before it is a lock: a full disk or a kill leaves none without a holder
        aside.write_text(json.dumps(record))
        for _ in range(3):
            try:
                os.link(aside, path)
                return
            except FileExistsError:
                holder = _holder(path)
                who = (
                    f"{holder.get('what')} (pid {holder.get('pid')} on {holder.get('host')}, since"
                    f" {holder.get('since')})"
                )
                if _alive(path, holder):
                    raise UserError(
                        f"run_dir: {path.parent} is in use by {who}; wait for it or stop it"
                    ) from None
                with contextlib.suppress(OSError):  # another start may have been quicker
                    silent = time.time() - path.stat().st_mtime
                    gone = (
                        f"silent for {silent:.0f} s"
                        if silent > LOCK_STALE_SECONDS
                        else "which has ended"
                    )
                    print(
                        f"run_dir: {path.parent} was in use by {who}, {gone}: its lock is taken"
                        " over",
                        file=sys.stderr,
                    )
                path.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)
    raise UserError(
        f"run_dir: {path} keeps changing hands; is another start of this run under way?"
    )


def _holder(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    try:
        silent = time.time() - path.stat().st_mtime
    except OSError:
        return False
    if silent > LOCK_STALE_SECONDS:
        return False
    if holder.get("host") == socket.gethostname() and holder.get("pid"):
        # a host or container that came back gives the same small numbers to other processes
        process = _process(holder["pid"])
        return process is not None and holder.get("process", process) == process
    return True


def _process(pid: int) -> str | None:
    """What tells a process from another one of the same number, before or after it; None when there
    is none.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # when it started
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{after_name[19]}"
    except (OSError, IndexError):
        return None


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    while not stop.wait(LOCK_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
