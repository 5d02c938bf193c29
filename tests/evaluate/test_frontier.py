"""Random's line and the distance to it: known points give known numbers, noise an interval that
holds them.
"""

from __future__ import annotations

import numpy as np
import pytest

from grads_ds.evaluate.candidates import Candidate, Rows
from grads_ds.evaluate.frontier import frontier


def model(name: str, kind: str, gain: float, forgetting: float) -> Candidate:
    """Rows of unequal weight and values about the given means."""
    weights, choice = np.tile([10.0, 30.0], 20), np.ones(40, bool)
    ripple = np.tile([1.5, 0.5, 0.5, 1.5], 10)
    ripple *= 1 / np.average(ripple, weights=weights)
    rows = [Rows(mean * ripple, weights, choice) for mean in (gain, forgetting)]
    return Candidate(name, kind, name, None, None, 10, *rows)


def test_excess_is_forgetting_less_the_lines_at_the_same_gain() -> None:
    line = [
        model("r10", "random", 0.1, 0.02),
        model("r50", "random", 0.3, 0.10),
        model("full", "full", 0.4, 0.20),
    ]
    others = [
        model("below", "subset", 0.2, 0.03),  # the line: 0.06
        model("above", "interpolation", 0.05, 0.03),  # 0.01, towards the base model
        model("beyond", "subset", 0.5, 0.03),
    ]
    found = frontier([*others, *line], 50, 0)
    assert found is not None
    assert [name for name, _, _ in found.line] == ["base", "r10", "r50", "full"]
    assert found.excess["below"].value == pytest.approx(-0.03, abs=1e-9)
    assert found.excess["above"].value == pytest.approx(0.02, abs=1e-9)
    assert found.excess["beyond"].value is None and found.excess["beyond"].interval is None
    assert set(found.excess) == {"below", "above", "beyond"}
    assert frontier(others, 50, 0) is None


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(7), 0
    for _ in range(60):
        rows = 60
        truth = {"r1": (0.1, 0.02), "r2": (0.3, 0.10), "s": (0.2, 0.05)}
        models = []
        shared = rng.normal(0, 0.3, (2, rows))
        for name, (gain, lost) in truth.items():
            own = rng.normal(0, 0.1, (2, rows))
            part = [
                Rows(mean + mean * (shared[i] + own[i]), np.ones(rows), np.ones(rows, bool))
                for i, mean in enumerate((gain, lost))
            ]
            kind = "subset" if name == "s" else "random"
            models.append(Candidate(name, kind, name, None, None, 10, *part))
        found = frontier(models, 200, 0)
        assert found is not None
        interval = found.excess["s"].interval
        assert interval is not None
        held += interval[0] <= 0.05 - 0.06 <= interval[1]
    assert 50 <= held <= 60
