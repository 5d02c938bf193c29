"""The batch plan: every sample once, within the budget, in equal steps, with little padding and
little waiting.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_ds.data.batches import BatchPlan, plan_batches, tight_batches


def realistic(samples: int, seed: int = 0, longest: int = 2048) -> np.ndarray:
    """Log-normal lengths as of answers to questions, cut off at the model's context."""
    drawn = np.random.default_rng(seed).normal(np.log(250), 0.8, samples)
    return np.clip(np.exp(drawn), 4, longest).astype(np.int64)


def check(plan: BatchPlan, lengths: np.ndarray, ranks: int, budget: int) -> None:
    """What must hold of every plan, and its own figures counted again from its batches."""
    assert len(plan.batches) == ranks
    assert {len(steps) for steps in plan.batches} == {plan.steps}
    batches = [batch for steps in plan.batches for batch in steps]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    area = {batch: len(batch) * max(lengths[list(batch)]) for batch in batches if batch}
    for batch, tokens in area.items():
        assert tokens <= budget or len(batch) == 1
    if area:
        work = np.array(
            [[area.get(steps[s], 0) for steps in plan.batches] for s in range(plan.steps)]
        )
        assert plan.padding_fraction == pytest.approx(1 - lengths.sum() / work.sum())
        assert plan.imbalance == pytest.approx(work.max(axis=1).sum() / work.mean(axis=1).sum() - 1)
        # the costliest comes first
        assert list(work.max(axis=1)) == sorted(work.max(axis=1), reverse=True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 300), max_size=80),
    st.integers(1, 9),
    st.integers(1, 700),
    st.integers(0, 5),
)
def test_every_plan_is_sound(lengths: list[int], ranks: int, budget: int, seed: int) -> None:
    plan = plan_batches(lengths, ranks, budget, seed)
    check(plan, np.array(lengths, np.int64), ranks, budget)
    assert plan == plan_batches(lengths, ranks, budget, seed)
    # no step in which nobody works, and as few steps as batches filled to the brim would need
    assert all(any(steps[s] for steps in plan.batches) for s in range(plan.steps))
    assert plan.steps <= -(-_greedy(lengths, budget) // ranks)


def _greedy(lengths: list[int], budget: int) -> int:
    batches, rest = 0, sorted(lengths, reverse=True)
    while rest:
        rest = rest[max(1, budget // rest[0]) :]
        batches += 1
    return batches


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("budget", [2048, 4096, 16384])
@pytest.mark.parametrize("samples", [3000, 8000])
def test_realistic_lengths_waste_little(samples: int, budget: int, ranks: int) -> None:
    lengths = realistic(samples)
    plan = plan_batches(lengths, ranks, budget, seed=0)
    check(plan, lengths, ranks, budget)
    assert plan.padding_fraction < 0.05
    assert plan.imbalance < 0.02


@pytest.mark.parametrize("ranks", [2, 8])
def test_real_lengths_waste_little(material: Path, ranks: int) -> None:
    rows = (material / "data/medicine_medquad6k.jsonl").read_text().splitlines()
    lengths = np.array(
        [sum(len(m["content"].split()) for m in json.loads(row)["messages"]) + 8 for row in rows]
    )
    plan = plan_batches(lengths, ranks, 16384, seed=0)
    check(plan, lengths, ranks, 16384)
    assert plan.padding_fraction < 0.05 and plan.imbalance < 0.02


def test_the_pools_order_changes_only_the_names() -> None:
    """Shuffling the pool leaves the batches' lengths as they were: the plan hangs on contents, not
    on the files' order.
    """
    lengths = realistic(1000)
    order = np.random.default_rng(1).permutation(1000)
    plans = plan_batches(lengths, 4, 4096, 0), plan_batches(lengths[order], 4, 4096, 0)
    shapes = [
        [[sorted(row[list(batch)].tolist()) for batch in steps] for steps in plan.batches]
        for plan, row in zip(plans, (lengths, lengths[order]), strict=True)
    ]
    assert shapes[0] == shapes[1]


def test_the_seed_draws_among_equals() -> None:
    lengths = [10] * 64
    assert plan_batches(lengths, 2, 40, 0) != plan_batches(lengths, 2, 40, 1)


def test_over_long_samples_stand_alone_and_first() -> None:
    plan = plan_batches([5, 900, 7, 1200, 6], 1, 100, 0)
    assert plan.batches[0][:2] == ((3,), (1,))
    assert plan.over_budget == 2
    assert "2 samples above the budget" in plan.summary()


def test_ranks_that_run_out_get_empty_batches() -> None:
    plan = plan_batches([10, 20], 4, 100, 0)
    assert plan.steps == 1
    assert sorted(len(steps[0]) for steps in plan.batches) == [0, 0, 1, 1]
    check(plan, np.array([10, 20]), 4, 100)
    assert plan_batches([], 3, 100, 0).steps == 0


def test_another_cost_is_what_gets_balanced() -> None:
    """With attention's quadratic cost, ranks are balanced by that cost rather than by tokens."""
    lengths = realistic(4000)

    def cost(rows: np.ndarray, longest: np.ndarray) -> np.ndarray:
        return rows * longest * (1.0 + longest / 1000)

    plan = plan_batches(lengths, 4, 8192, 0, cost=cost)
    work = [
        [
            sum(cost(np.array(len(b)), lengths[list(b)].max()) for b in [steps[s]] if b)
            for steps in plan.batches
        ]
        for s in range(plan.steps)
    ]
    slowest, mean = np.max(work, axis=1), np.mean(work, axis=1)
    assert plan.imbalance == pytest.approx(slowest.sum() / mean.sum() - 1)
    assert plan.imbalance < 0.02


@pytest.mark.parametrize("arguments", [([5, 0], 1, 10), ([5], 0, 10), ([5], 1, 0)])
def test_senseless_arguments_are_refused(arguments: tuple[list[int], int, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        plan_batches(*arguments, seed=0)


def test_a_million_lengths_take_seconds() -> None:
    lengths = realistic(1_000_000)
    began = time.process_time()
    plan = plan_batches(lengths, 8, 16384, 0)
    assert time.process_time() - began < 10
    assert plan.num_samples == 1_000_000


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), max_size=7),
    budget=st.integers(1, 40),
    each=st.integers(0, 20),
)
def test_tight_batches_cost_the_least_that_cuts_can(
    lengths: list[int], budget: int, each: int
) -> None:
    batches = tight_batches(lengths, budget, each)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    descending = sorted(lengths, reverse=True)
    costs = []
    for cuts in range(2 ** max(0, len(lengths) - 1)):
        stops = [i + 1 for i in range(len(lengths) - 1) if cuts >> i & 1] + [len(lengths)]
        parts = [descending[a:b] for a, b in pairwise([0, *stops])]
        if all(len(part) <= 1 or part[0] * len(part) <= budget for part in parts):
            costs.append(sum(part[0] * len(part) + each for part in parts if part))
    of = [[lengths[i] for i in batch] for batch in batches]
    assert all(len(part) == 1 or max(part) * len(part) <= budget for part in of)
    assert sum(max(part) * len(part) + each for part in of) == min(costs)


def test_tight_batches_pad_less_where_a_batch_costs_less() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 64)

    def padded(each: int) -> int:
        batches = tight_batches(lengths, 10**6, each)
        return sum(int(lengths[batch].max()) * len(batch) for batch in batches)

    assert padded(0) == lengths.sum() < padded(100) < padded(10**6) == 64 * lengths.max()
