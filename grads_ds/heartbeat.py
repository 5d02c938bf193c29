"""What a rank tells its supervisor (launcher/rank.py): that it advances, how far it is, and why it failed.

Writes JSON lines into a pipe and, on SIGUSR1, every thread's stack into a file; both are inherited. Without a supervisor
(`deepspeed --module grads_ds ...`) nothing is written. No torch import.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from typing import Any

VARIABLE = "GRADS_DS_SUPERVISOR"
INTERVAL_SECONDS = 0.5  # at most so often; a step may be shorter
ERROR_CHARACTERS = 16_000  # a pipe holds 64 KiB and a rank never waits for its supervisor
_pipe: int | None = None
_last = 0.0
_work: dict[str, Any] | None = None  # what is being done, and where and when it began: the pace follows from these


def start() -> None:
    """Take over what the supervisor handed down. Called once, before anything slow."""
    global _pipe
    # out of the environment: a process that this rank starts must not answer for it
    handed = os.environ.pop(VARIABLE, None)
    if handed is None:
        return
    _pipe, stack = (int(number) for number in handed.split(","))
    os.set_inheritable(_pipe, False)
    os.set_inheritable(stack, False)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    faulthandler.enable()  # a segmentation fault leaves its stack in the log


def supervised() -> bool:
    """Whether a supervisor listens."""
    return _pipe is not None


def beat(doing: str, done: int | None = None, total: int | None = None) -> None:
    """This rank advances: it is `doing` something, `done` of `total` steps. Cheap enough for every step."""
    global _last, _work
    now = time.monotonic()
    if _pipe is not None and (now - _last > INTERVAL_SECONDS or done is None or done == total):
        _last = now
        if _work is None or _work["doing"] != doing or _work["total"] != total:
            _work = {"doing": doing, "total": total, "first": done or 0, "since": time.time()}
        _write({"progress": _work | {"done": done, "time": time.time()}})


def failed(error: str, status: int) -> None:
    """This rank is about to leave with `status` because of `error`."""
    _write({"error": error[-ERROR_CHARACTERS:], "error_status": status, "error_time": time.time()})


def _write(record: dict[str, Any]) -> None:
    if _pipe is not None:
        with contextlib.suppress(OSError):  # full, or nobody reads: the rank goes on
            os.write(_pipe, json.dumps(record).encode() + b"\n")
