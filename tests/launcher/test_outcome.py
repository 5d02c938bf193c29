"""Whose trouble came first, and the table of exit statuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launcher.outcome import DISK_FULL, DONE, FAILED, LOST, MEANINGS, OUT_OF_MEMORY, judge

REPO = Path(__file__).resolve().parents[2]


def record(rank: int, state: str = "done", status: int = 0, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "host": f"node{rank}", "state": state, "status": status, "ended": float(rank)} | more


def test_documented_table_is_the_programs() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (REPO / "docs/launcher.md").read_text(), flags=re.M)
    assert {int(status): meaning for status, meaning in rows} == MEANINGS


def test_only_ranks_that_are_all_done_are_a_success() -> None:
    assert judge([record(0), record(1)], ()).status == DONE
    assert judge([record(0), record(1, "failed", 1)], ()).status == FAILED
    assert judge([record(0), record(1, "running")], (1,)).status == LOST


def test_a_consequence_never_hides_its_cause() -> None:
    closed = record(
        0, "failed", 1, error="Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]:99", error_time=0.0
    )
    assert judge([closed, record(1, "failed", 1, error="KeyError: 'x'", error_time=5.0)], ()).rank == 1
    assert judge([closed, record(1, "running")], (1,)).status == LOST
    assert judge([closed, record(1, "stopped", -15, reason="SIGTERM on node1")], ()).rank == 0


def test_the_earlier_of_two_own_failures_is_told() -> None:
    late = record(0, "failed", 1, error="ValueError: late", error_time=9.0)
    early = record(1, "failed", 1, error="ValueError: early", error_time=3.0)
    assert judge([late, early], ()).error == "ValueError: early"


def test_the_kernels_killer_is_told_from_another_kill() -> None:
    assert judge([record(0, "failed", -9, oom=True)], ()).status == OUT_OF_MEMORY
    killed = judge([record(0, "failed", -9)], ())
    assert killed.status == LOST and "SIGKILL" in killed.sentence


@pytest.mark.parametrize(
    "error, status",
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB", OUT_OF_MEMORY),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", OUT_OF_MEMORY),
        ("OSError: [Errno 28] No space left on device", DISK_FULL),
        ("OSError: [Errno 122] Disk quota exceeded", DISK_FULL),
        ("ValueError: anything else", FAILED),
    ],
)
def test_a_rank_s_own_words_tell_the_kind_of_failure(error: str, status: int) -> None:
    assert judge([record(0, "failed", 1, error=f"Traceback\n{error}")], ()).status == status
    assert judge([record(0, "failed", -11)], ()).status == LOST
