"""A rank's log: kept small while the rank writes on, and read while it is kept small.

The rank's supervisor rotates it: what is there becomes `rank<N>.log.1`, which replaces an earlier
one. The rank holds the file open for appending, so that it is emptied, not renamed; it is stopped
for the moment in which the last lines are taken over, and none of its own is lost. The launcher
reads rank 0's across that. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

LOG_BYTES = 64 * 2**20  # from which a log is rotated; two of them are kept


def older(log: Path) -> Path:
    """Where the lines before the last rotation are."""
    return log.with_name(f"{log.name}.1")


class RankLog:
    """The supervisor's side: the log of one rank, of at most about `limit` bytes."""

    def __init__(self, log: Path, limit: int):
        self.log, self.limit = log, limit
        self.dropped = 0  # bytes that no file holds any more

    def keep_small(self, group: int) -> None:
        """Rotate the log when it is too large; `group` is the process group that writes it.

        What a file system refuses is left as it is: the rank's own writes will tell.
        """
        with contextlib.suppress(OSError):
            if self.log.stat().st_size > self.limit:
                self._rotate(group)

    def _rotate(self, group: int) -> None:
        before, aside = older(self.log), self.log.with_name(f".{self.log.name}.1")
        gone = before.stat().st_size if before.exists() else 0
        try:
            with open(self.log, "rb") as source, open(aside, "wb") as target:
                shutil.copyfileobj(source, target)  # the rank writes on meanwhile
                with _stopped(group):
                    shutil.copyfileobj(source, target)
                    target.flush()
                    aside.replace(before)
                    os.truncate(self.log, 0)
        finally:
            aside.unlink(missing_ok=True)
        self.dropped += gone
        with open(self.log, "a") as log:
            lost = f"; the {self.dropped:,} bytes before them are gone" if self.dropped else ""
            log.write(f"grads-ds: older lines are in {before.name}{lost}\n")


@contextlib.contextmanager
def _stopped(group: int) -> Iterator[None]:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)


class LogReader:
    """The launcher's side: what was written since the last look, also across a rotation."""

    def __init__(self, log: Path):
        self.log, self._position = log, 0
        self._older = self._mark()

    def _mark(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            state = older(self.log).stat()
            return state.st_ino, state.st_size
        return None

    def new(self) -> bytes:
        """The new bytes; nothing while there is no log. Raises OSError."""
        mark, text = self._mark(), b""
        if mark is not None and mark != self._older:
            if self.log.stat().st_size >= mark[1]:
                return b""  # it is about to be emptied
            text, self._position = _from(older(self.log), self._position), 0
            self._older = mark
        rest = _from(self.log, self._position)
        self._position += len(rest)
        return text + rest


def _from(path: Path, position: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(position)
        return file.read()
