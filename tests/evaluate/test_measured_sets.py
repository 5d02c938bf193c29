"""How far retention is measured: the plan's cost, the places of the divergence, the halves of the
prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grads_ds.evaluate.measured_sets import (
    in_choice_half,
    measured_set,
    predicted_targets,
    prompt_of,
    spread_positions,
)
from grads_ds.evaluate.retention import plan_retention


def test_the_plan_stays_within_its_cost_and_takes_whole_pairs() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": list(range(n)), "labels": [-100] * (n // 2) + list(range(n - n // 2))}
        for n in rng.integers(20, 300, 200)
    ]

    class NoText:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "x" * len(ids)

    measured = measured_set("general", rows, NoText())
    lengths = rng.integers(10, 60, 256).tolist()
    for body, head in ((106_000_000, 28_000_000), (6_500_000_000, 500_000_000), (1000, 20_000)):
        plan = plan_retention([measured], lengths, 64, (body, head), 0.2)
        assert plan.cost <= 0.2 + 1e-9 and plan.prompts % 2 == 0 and plan.prompts >= 4
        thin = measured.thinned(plan.share)
        taken = sum(len(places) for places in thin.positions)
        assert taken == pytest.approx(plan.share * measured.targets.sum(), abs=1)
    assert plan_retention([measured], lengths, 64, (100, 10), 1e9).share == 1.0


def test_positions_are_spread_evenly_and_lie_within_their_rows() -> None:
    targets = np.array([5, 0, 1, 40, 3], np.int64)
    every = spread_positions(targets, 1.0)
    assert [p.tolist() for p in every] == [list(range(n)) for n in targets]
    half = spread_positions(targets, 0.5)
    assert len(half) == 5 and all((p < n).all() for p, n in zip(half, targets, strict=True))
    assert np.diff(half[3]).tolist() == [2] * (len(half[3]) - 1)
    assert all(len(p) == 0 for p in spread_positions(targets, 0.0))


def test_a_prompt_is_of_one_half_whatever_answer_follows_it() -> None:
    rows = [{"input_ids": [7, 8, n, 1, 2], "labels": [-100, -100, -100, 1, 2]} for n in range(400)]
    halves = [in_choice_half(prompt_of(row)) for row in rows]
    assert 140 < sum(halves) < 260
    other = [row | {"input_ids": [*row["input_ids"][:3], 9, 9, 9]} for row in rows]
    for row in other:
        row["labels"] = [-100] * 3 + [9] * 3
    assert [in_choice_half(prompt_of(row)) for row in other] == halves
    assert predicted_targets({"input_ids": [1, 2], "labels": [1, 2]}) == [1]
