"""What is slow between hosts is told by the link and by what gloo can."""

from __future__ import annotations

import json

import pytest

from conftest import REPO
from grads_ds.launcher.doctor.links import GLOO_BYTES_PER_SECOND, USUAL_SHARE, check_collectives
from grads_ds.launcher.doctor.on_host import COLLECTIVE_BYTES


@pytest.mark.parametrize(
    "backend, megabits, speed, level",
    [
        ("gloo", 1000, 0.98 * 1.25e8, "ok"),
        ("gloo", 1000, 0.2 * 1.25e8, "warning"),
        ("nccl", 400_000, 2e9, "warning"),
        ("gloo", 400_000, 2e9, "ok"),
        ("gloo", 400_000, 0.5e9, "warning"),
        ("gloo", None, 6e7, "ok"),
        ("gloo", None, 4e7, "warning"),
    ],
)
def test_a_collective_is_slow_by_its_link_and_by_what_gloo_can(
    backend: str, megabits: int | None, speed: float, level: str
) -> None:
    """A third of the link, but of gloo no more than a processor copies
    (docs/results/bench_collectives.json).
    """
    found = {
        "backend": backend,
        "all_reduce": {"seconds": 1.0, "bytes_per_second": speed, "correct": True},
    }
    assert [finding.level for finding in check_collectives(found, megabits, several=True)] == [
        level
    ]


def test_the_usual_share_is_what_was_measured() -> None:
    """At the doctor's own size every limited link gave more than thrice what is told as slow, and
    an unlimited one twice.
    """
    rows = json.loads((REPO / "docs/results/bench_collectives.json").read_text())["shares"]
    ours = [row for row in rows if row["kib"] == COLLECTIVE_BYTES // 1024]
    limited = [
        row[name]
        for row in ours
        if "veth" not in row["link"]
        for name in ("all_reduce", "all_gather")
    ]
    assert len(limited) == 6 and min(limited) > 3 * USUAL_SHARE
    (free,) = [row for row in ours if "veth" in row["link"]]
    assert min(free["all_reduce"], free["all_gather"]) * 1.25e9 > 2 * GLOO_BYTES_PER_SECOND
