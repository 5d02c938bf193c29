"""The lock's file: who stands in it, how old it is, and how one start of several takes it over.

A holder is known to have ended where its process can be looked for (the same boot, the same pid
namespace). Elsewhere it counts as gone once its lock has not been touched while this process
watched, by this process's own clock; the clock of the file system only says how long to watch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.run_dir.processes import process_gone

BEAT_SECONDS = 2.0  # how often a holder touches its lock
# a lock that looks as old as this, and is not touched for five beats, has no holder
STALE_SECONDS = 120.0
WATCHED_BEATS = 5


def take(path: Path, record: dict[str, Any]) -> None:
    """Put `record` into the lock at `path`: by a link that only one start can make, once the old
    one is moved away by a rename that only one start can do. Raises UserError naming a holder that
    lives.
    """
    aside = path.with_name(f".{path.name}.{record['token']}.tmp")
    try:
        # whole before it is a lock: a full disk or a kill leaves none without a holder
        aside.write_text(json.dumps(record))
        for _ in range(3):
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
                if read_holder(path).get("token") == record["token"]:
                    return
                continue
            holder = read_holder(path)
            how = _why_gone(path, holder, aside)
            if how is None:
                raise UserError(
                    f"run_dir: {path.parent} is in use by {who(holder)}; wait for it or stop it:"
                    f" grads-ds stop {shlex.quote(str(path.parent))}"
                )
            if _move_away(path, holder, record["token"]):
                print(
                    f"run_dir: {path.parent} was in use by {who(holder)}, {how}: its lock is"
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
    same = read_holder(old).get("token") == holder.get("token")
    if not same:
        with contextlib.suppress(FileExistsError):
            os.link(old, path)
    old.unlink()
    return same


def _why_gone(path: Path, holder: dict[str, Any], probe: Path) -> str | None:
    """Why the lock has no holder any more, in words; None while it may have one.

    A lock that looks old by the file system's clock is watched for some beats, one from the future
    (clocks that differ) for as long as a stale one: only what is not touched meanwhile is stale.
    """
    if process_gone(holder) or not path.exists():
        return "which has ended"
    old = age(path, probe)
    if -BEAT_SECONDS <= old <= STALE_SECONDS:
        return None
    watched = WATCHED_BEATS * BEAT_SECONDS if old > 0 else STALE_SECONDS
    print(
        f"run_dir: watching the lock of {who(holder)} for {watched:.0f} s: is it touched?",
        file=sys.stderr,
        flush=True,
    )
    first, deadline = _seen(path), time.monotonic() + watched
    while time.monotonic() < deadline:
        time.sleep(min(0.5, BEAT_SECONDS))
        if _seen(path) != first:
            return None
    return f"silent for {max(old, watched):.0f} s"


def _seen(path: Path) -> tuple[object, ...]:
    with contextlib.suppress(OSError):
        return read_holder(path).get("token"), path.stat().st_mtime_ns
    return ()


def who(holder: dict[str, Any]) -> str:
    """A holder in words."""
    return (
        f"{holder.get('what')} (pid {holder.get('pid')} on {holder.get('host')}, since"
        f" {holder.get('since')})"
    )


def read_holder(path: Path) -> dict[str, Any]:
    """The record in a lock file; empty when there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def age(path: Path, probe: Path | None = None) -> float:
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
