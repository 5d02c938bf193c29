"""How a job ended: the exit statuses, and which rank's trouble came first.

Reads the ranks' records; decides. The table here is the one of docs/launcher.md (a test compares
them).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.run_dir.storage import DISK_FULL, STORAGE

DONE, FAILED, WRONG_INPUT, OUT_OF_MEMORY, LOST, HANG, NOT_STARTED = range(7)
LOCK_LOST = 9
HUNG_UP, STOPPED = 129, 143  # 128 + SIGHUP, SIGTERM; an interrupt from the keyboard is 130
MEANINGS = {
    DONE: "done",
    FAILED: "a rank failed; its own exception comes last",
    WRONG_INPUT: "the input or a host is not as it must be; every problem is listed",
    OUT_OF_MEMORY: "a rank ran out of GPU memory, or the kernel killed it for lack of host memory",
    LOST: "a host or a rank was lost: silent, or killed by a signal",
    HANG: "no progress for the time allowed; every rank's stack was taken",
    NOT_STARTED: "the runner did not start every rank",
    DISK_FULL: "no space, no inodes or no quota left where the run writes",
    STORAGE: "the file system failed: a file could not be read, written or found",
    LOCK_LOST: "another start took the run directory over; this one has stopped",
    HUNG_UP: "the terminal is gone (SIGHUP); under nohup a run goes on",
    130: "interrupted from the keyboard (SIGINT)",
    STOPPED: "stopped by SIGTERM or SIGUSR1, here or on a host (preemption), or by grads-ds stop",
}
RETRYABLE = (FAILED, LOST, HANG, NOT_STARTED, OUT_OF_MEMORY, STOPPED, STORAGE)

_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|can't allocate"
    r" memory|MemoryError|CUBLAS_STATUS_ALLOC_FAILED"
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded")
# what a healthy rank says when another one has gone
_CONSEQUENCE = re.compile(
    r"Connection (?:closed|reset|refused|timed out)|Broken pipe|remote process"
    r" exited|ncclRemoteError|DistNetworkError"
    r"|DistStoreError|Socket Timeout|recvValue failed|failed to recv|Application timeout caused"
    r" pair closure"
    r"|Timed out (?:waiting|after)"
)


@dataclass(frozen=True)
class Outcome:
    """How one job ended. `error` is the first failing rank's own text, empty when it left none."""

    status: int
    sentence: str = "done"
    error: str = ""
    rank: int | None = None
    host: str | None = None

    @property
    def may_pass(self) -> bool:
        """Whether another start may succeed: not after wrong input or a full disk, nor when the
        launcher itself was stopped.
        """
        return self.status in RETRYABLE and not (self.status == STOPPED and self.rank is None)


def judge(records: Sequence[Mapping[str, Any]], lost: Collection[int]) -> Outcome:
    """The outcome of ranks that have ended or are in `lost`. `records` in the order in which the
    launcher saw them end.

    A rank's own failure goes before a lost one, that before failures that follow from another
    rank's end, those before ranks that were told to stop.
    """
    failed = [
        record
        for record in records
        if record.get("state") == "failed" and record["rank"] not in lost
    ]
    failed.sort(key=_when)
    own = [record for record in failed if not _CONSEQUENCE.search(_last_line(record))]
    if own:
        return _of_failed(own[0])
    gone = [record for record in records if record["rank"] in lost]
    gone += [
        record
        for record in records
        if "runner" in record.get("reason", "") and record.get("status") != 0
    ]
    if gone:
        return _of_lost(gone)
    if failed:
        return _of_failed(failed[0])
    stopped = [record for record in records if record.get("state") == "stopped"]
    if stopped:  # whoever stopped the first one; the launcher has stopped the others
        first = min(stopped, key=lambda record: bool(record.get("by_launcher")))
        sentence = f"rank {first['rank']} was stopped: {first.get('reason')}"
        return Outcome(STOPPED, sentence, "", first["rank"], first.get("host"))
    return Outcome(DONE)


def _of_failed(record: Mapping[str, Any]) -> Outcome:
    rank, host, status, error = (
        record["rank"],
        record.get("host"),
        record.get("status", 1),
        record.get("error", ""),
    )
    where = f"rank {rank} ({host})"
    if record.get("oom"):
        sentence = (
            f"{where} was killed by the kernel's OOM killer; fewer tokens per micro-batch,"
            " offload or more hosts"
        )
        return Outcome(OUT_OF_MEMORY, sentence, error, rank, host)
    if status == -signal.SIGBUS:
        sentence = (
            f"{where} was killed by SIGBUS: a file mapped into memory could not be read or written"
            " (a file system that fails, a file cut short, /dev/shm full)"
        )
        return Outcome(STORAGE, sentence, error, rank, host)
    if status < 0 and not error:
        return Outcome(
            LOST,
            f"{where} was killed by signal {-status}{_signal_name(-status)}",
            error,
            rank,
            host,
        )
    if record.get("error_status") == WRONG_INPUT:
        return Outcome(WRONG_INPUT, f"{where} refused its input", error, rank, host)
    if _MEMORY.search(error):
        return Outcome(OUT_OF_MEMORY, f"{where} ran out of memory", error, rank, host)
    storage = record.get("error_status")
    if storage == DISK_FULL or _DISK.search(error):
        return Outcome(DISK_FULL, f"{where} found no space left", error, rank, host)
    if storage == STORAGE:
        return Outcome(STORAGE, f"{where} could not use a file", error, rank, host)
    return Outcome(FAILED, f"failed first on {where}, status {status}", error, rank, host)


def _of_lost(records: Sequence[Mapping[str, Any]]) -> Outcome:
    hosts = sorted({str(record.get("host") or record.get("wanted_host")) for record in records})
    ranks = ", ".join(str(record["rank"]) for record in records[:8]) + (
        ", ..." if len(records) > 8 else ""
    )
    many = len(records) > 1
    sentence = (
        f"rank{'s' if many else ''} {ranks} on {', '.join(hosts)} fell silent without a word:"
        " killed, or the host is down"
    )
    return Outcome(LOST, sentence, "", records[0]["rank"], hosts[0])


def _when(record: Mapping[str, Any]) -> float:
    return float(record.get("error_time", record.get("ended", 0.0)))


def _last_line(record: Mapping[str, Any]) -> str:
    lines = str(record.get("error", "")).strip().splitlines()
    return lines[-1] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""
