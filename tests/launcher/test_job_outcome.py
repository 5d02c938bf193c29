"""Whose trouble came first, and the table of exit statuses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grads_ds.launcher.job_outcome import (
    DISK_FULL,
    DONE,
    FAILED,
    LOST,
    MEANINGS,
    OUT_OF_MEMORY,
    judge,
)
from tests.launcher.faults import FAULTS

REPO = Path(__file__).resolve().parents[2]


def record(rank: int, state: str = "done", status: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "rank": rank,
        "host": f"node{rank}",
        "state": state,
        "status": status,
        "ended": float(rank),
    } | more


def test_documented_table_is_the_programs() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (REPO / "docs/launcher.md").read_text(), flags=re.M)
    assert {int(status): meaning for status, meaning in rows} == MEANINGS


def test_every_status_is_made_to_happen_and_no_other_is_written_down() -> None:
    """Each documented status has a fault in the tests' list (0: a warning); no literal of the
    program is missing from the table.
    """
    assert {fault.status for fault in FAULTS} == set(MEANINGS)
    files = [
        REPO / "grads_ds/cli.py",
        REPO / "grads_ds/__main__.py",
        *(REPO / "grads_ds/commands").glob("*.py"),
        *(REPO / "launcher").rglob("*.py"),
    ]
    assert len(files) > 20
    literals = {number for file in files for number in exit_literals(ast.parse(file.read_text()))}
    assert {0, 1, 2, 130} <= literals <= set(MEANINGS)


def exit_literals(tree: ast.AST) -> Iterator[int]:
    """Whole numbers handed to exit, raised as SystemExit, assigned to a name `status`, or returned
    by a function that says "status".
    """
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "sys.exit",
            "os._exit",
            "SystemExit",
            "exit",
        ):
            values = node.args
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "status":
            values = [node.value]
        elif isinstance(node, ast.FunctionDef) and node.name in (
            "main",
            "handle",
            "submit",
            "apply",
        ):
            values = [
                child.value
                for child in ast.walk(node)
                if isinstance(child, ast.Return) and child.value
            ]
        for value in values:
            for part in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                if isinstance(part, ast.Constant) and isinstance(part.value, int):
                    yield int(part.value)


def test_only_ranks_that_are_all_done_are_a_success() -> None:
    assert judge([record(0), record(1)], ()).status == DONE
    assert judge([record(0), record(1, "failed", 1)], ()).status == FAILED
    assert judge([record(0), record(1, "running")], (1,)).status == LOST


def test_a_consequence_never_hides_its_cause() -> None:
    closed = record(
        0,
        "failed",
        1,
        error="Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]:99",
        error_time=0.0,
    )
    assert (
        judge([closed, record(1, "failed", 1, error="KeyError: 'x'", error_time=5.0)], ()).rank == 1
    )
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
        (
            (
                "RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't"
                " allocate memory"
            ),
            OUT_OF_MEMORY,
        ),
        ("OSError: [Errno 28] No space left on device", DISK_FULL),
        ("OSError: [Errno 122] Disk quota exceeded", DISK_FULL),
        ("ValueError: anything else", FAILED),
    ],
)
def test_a_rank_s_own_words_tell_the_kind_of_failure(error: str, status: int) -> None:
    assert judge([record(0, "failed", 1, error=f"Traceback\n{error}")], ()).status == status
    assert judge([record(0, "failed", -11)], ()).status == LOST
