"""What a rank tells its supervisor (launcher/rank.py): that it advances, how far it is, and why it
failed.

With it goes what this rank's own work took of late, by which the launcher names slow ranks
(grads_ds/distributed/step_timing.py measures it).

Writes JSON lines into a pipe and, on SIGUSR2, every thread's stack into a file; both are inherited.
Without a supervisor (`deepspeed --module grads_ds ...`) nothing is written. No torch import.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from typing import Any

VARIABLE = "GRADS_DS_SUPERVISOR"
INTERVAL_SECONDS = 0.5  # at most so often; a step may be shorter
LOSSES = 5  # kept of a training
ERROR_CHARACTERS = 16_000  # a pipe holds 64 KiB and a rank never waits for its supervisor
_pipe: int | None = None
_last = 0.0
# what is being done, and where and when it began: the time left follows from these
_work: dict[str, Any] | None = None


class _StepWindows:
    """Seconds of this rank's own work by kind, and the steps they belong to, in windows of some
    length; the last two are kept.
    """

    def __init__(self, window_seconds: float):
        self.window_seconds = window_seconds
        self.forget()

    def forget(self) -> None:
        self.closed: list[dict[str, Any]] = []
        self._open()

    def _open(self) -> None:
        self.began, self.steps, self.work = time.monotonic(), 0, dict[str, float]()

    def close(self) -> None:
        seconds = time.monotonic() - self.began
        if self.steps and seconds >= self.window_seconds:
            self.closed = [
                *self.closed[-1:],
                {"steps": self.steps, "seconds": seconds, "work": self.work},
            ]
            self._open()


_windows = _StepWindows(float("inf"))
_losses: list[tuple[int, float]] = []  # (step, training loss), the last few


def start() -> None:
    """Take over what the supervisor handed down. Called once, before anything slow."""
    global _pipe, _windows
    # out of the environment: a process that this rank starts must not answer for it
    handed = os.environ.pop(VARIABLE, None)
    if handed is None:
        return
    *files, window = handed.split(",")
    _pipe, stack = (int(number) for number in files)
    _windows = _StepWindows(float(window))
    os.set_inheritable(_pipe, False)
    os.set_inheritable(stack, False)
    faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
    faulthandler.enable()  # a segmentation fault leaves its stack in the log


def supervised() -> bool:
    """Whether a supervisor listens."""
    return _pipe is not None


def beat(doing: str, done: int | None = None, total: int | None = None) -> None:
    """This rank advances: it is `doing` something, `done` of `total` steps.

    Cheap enough for every step.
    """
    global _last, _work
    now = time.monotonic()
    if _pipe is not None and (now - _last > INTERVAL_SECONDS or done is None or done == total):
        _last = now
        if _work is None or _work["doing"] != doing or _work["total"] != total:
            _work = {"doing": doing, "total": total, "first": done or 0, "since": time.time()}
            _windows.forget()  # another kind of work takes another time
        _windows.close()
        _write(
            {
                "progress": _work | {"done": done, "time": time.time()},
                "pace": _windows.closed,
                **_gpu_memory(),
            }
        )


def worked(kind: str, seconds: float) -> None:
    """This rank has spent `seconds` on work of its own ("computing", "reading"), for which it
    waited for no other rank.
    """
    _windows.work[kind] = _windows.work.get(kind, 0.0) + seconds


def stepped() -> None:
    """Another step of it begins."""
    _windows.steps += 1


def logged(step: int, loss: float) -> None:
    """The training logged its loss at a step."""
    _losses.append((step, loss))
    del _losses[:-LOSSES]
    _write({"losses": _losses})


def _gpu_memory() -> dict[str, int]:
    """The most bytes of GPU memory that this rank has held, once it uses a GPU."""
    # not imported for this; there once another thread's import of torch has come so far
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return {}
    return {"gpu_most": int(cuda.max_memory_allocated())}


def failed(error: str, status: int) -> None:
    """This rank is about to leave with `status` because of `error`."""
    _write({"error": error[-ERROR_CHARACTERS:], "error_status": status, "error_time": time.time()})


def _write(record: dict[str, Any]) -> None:
    if _pipe is not None:
        with contextlib.suppress(OSError):  # full, or nobody reads: the rank goes on
            os.write(_pipe, json.dumps(record).encode() + b"\n")
