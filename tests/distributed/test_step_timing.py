"""A rank's own work is what its innermost modules and its reading take; what it waits for in
between does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from grads_ds.distributed import heartbeat, step_timing


class Busy(nn.Module):
    """Half a tenth of a second of own work."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return x * self.weight


def wait(*_: object) -> None:
    """As an engine's hooks gather and release parameters."""
    time.sleep(0.2)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> heartbeat._StepWindows:
    monkeypatch.setattr(heartbeat, "supervised", lambda: True)
    monkeypatch.setattr(heartbeat, "_windows", heartbeat._StepWindows(0.0))
    return heartbeat._windows


def test_only_own_work_counts(supervised: heartbeat._StepWindows) -> None:
    model = nn.Sequential(Busy(), Busy())
    model[1].register_forward_pre_hook(wait)
    model[1].register_forward_hook(wait)
    with step_timing.attached(model):
        for _ in range(2):
            model(torch.ones(1)).sum().backward()
    model(torch.ones(1))  # no longer
    assert supervised.steps == 2
    assert supervised.work["computing"] == pytest.approx(0.2, abs=0.1)


def test_reading_counts_and_windows_close(supervised: heartbeat._StepWindows) -> None:
    def rows() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    assert list(step_timing.Read(rows())) == [0, 1, 2]
    heartbeat.stepped()
    supervised.close()
    assert supervised.closed[0]["steps"] == 1 and supervised.closed[0]["work"][
        "reading"
    ] == pytest.approx(0.15, abs=0.1)
    assert supervised.work == {} and supervised.steps == 0


def test_without_a_supervisor_nothing_is_measured() -> None:
    assert step_timing.attach(nn.Linear(1, 1)) == []
