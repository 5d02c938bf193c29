"""How workers share the test files (`pytest -n`): one of them takes files from the front of the
queue, where those that wait stand, the others from its back, where those that compute stand; the
quick ones between them are left for the end, so that no worker is long alone.

Tests over hosts and of the launcher wait most of their time. Handed out in the order of their names
they would wait beside each other, and the processors with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

LAUNCHER = Path(__file__).absolute().parent / "launcher"


def sort(items: list[pytest.Item]) -> None:
    """Order the items by their files' places in the queue, file by file."""
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    items.sort(key=lambda item: place(item.path, marks[item.path]))


def place(file: Path, marks: Iterable[str]) -> int:
    """From the front: long ones over hosts, others over hosts, the launcher's, all others; at the
    back those that compute for more than ten seconds.
    """
    slow = "slow" in marks
    if "cluster" in marks:
        return 0 if slow else 1
    if LAUNCHER in file.parents:
        return 2
    return 4 if slow else 3


class FromBothEnds(LoadFileScheduling):
    """The first worker takes the queue's first file, any other its last."""

    def _assign_work_unit(self, node: Any) -> None:
        if node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)
