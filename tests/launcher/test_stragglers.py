"""A slow rank is told by its own work alone, lasting and costly; what all ranks wait for makes
nobody slow.
"""

from __future__ import annotations

from typing import Any

from grads_ds.launcher.stragglers import find_stragglers


def record(
    rank: int, *steps: float, doing: str = "sft", count: int = 10, **more: Any
) -> dict[str, Any]:
    """A running rank whose work took `steps` seconds a step in its last ten-second windows."""
    windows = [
        {"steps": count, "seconds": 10.0, "work": {"computing": s * count, "reading": 0.0}}
        for s in steps
    ]
    return {
        "rank": rank,
        "host": f"node{rank}",
        "state": "running",
        "progress": {"doing": doing},
        "pace": windows,
    } | more


def names(*records: dict[str, Any]) -> list[int] | None:
    found = find_stragglers(records)
    return None if found is None else [one.rank for one in found]


def test_the_slow_one_of_many_and_of_two() -> None:
    many = [record(rank, 0.2, 0.2) for rank in range(7)]
    assert names(*many) == []
    assert names(*many, record(7, 0.5, 0.6)) == [7]
    assert names(record(0, 0.8, 0.8), record(1, 0.2, 0.2)) == [0]
    told = find_stragglers([record(0, 0.8, 0.8), record(1, 0.2, 0.2)])
    assert (
        told is not None
        and told[0].sentence
        == "rank 0 on node0 is slow: its own work takes 4.0 times as long as the median rank's "
        "(0.8 s computing, 0 s reading a step; the median rank 0.2 s)"
    )


def test_one_bad_window_is_not_enough_nor_what_costs_nothing() -> None:
    fast = [record(rank, 0.2, 0.2) for rank in range(3)]
    assert names(*fast, record(3, 0.2, 0.9)) == names(*fast, record(3, 0.9, 0.2)) == []
    # of a step of one second
    assert names(*(record(rank, 1e-4, 1e-4) for rank in range(3)), record(3, 4e-4, 4e-4)) == []


def test_ranks_that_cannot_be_compared_are_not() -> None:
    assert names(record(0, 0.2, 0.2)) is None
    assert names(record(0, 0.2, 0.2), record(1, 0.9)) is None
    assert names(record(0, 0.2, 0.2), record(1, 0.9, 0.9, doing="held-out loss")) is None
    assert names(record(0, 0.2, 0.2), record(1, 0.2, 0.2), record(2, 0.9, 0.9, state="done")) == []
