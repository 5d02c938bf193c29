"""Budgets in samples and tokens, and their spread over strata."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.budget import above_mean, spread
from grads_ds.selection.choose import choose
from selection.pools import score_table

FRACTIONS = [(0.05, 1000, 50), (0.05, 10, 1), (0.001, 10, 1), (0.25, 10, 3), (1, 9, 9), (1.0, 9, 9)]


@pytest.mark.parametrize(("budget", "n", "wanted"), [*FRACTIONS, (2, 9, 2), (9, 9, 9)])
def test_fraction_and_count(budget: float, n: int, wanted: int) -> None:
    assert len(choose(score_table(n), SelectConfig(budget=budget), 0).chosen) == wanted


@pytest.mark.parametrize("budget", [0, -0.1, 7.5, float("inf"), float("nan"), "most"])
def test_senseless_budgets_are_refused(budget: object) -> None:
    with pytest.raises(ValidationError):
        SelectConfig(budget=budget)


def test_a_count_above_the_pool_names_both_numbers() -> None:
    with pytest.raises(UserError, match=r"the pool's 30 samples; found 31"):
        choose(score_table(30), SelectConfig(budget=31), 0)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 200), limit=st.integers(420, 50_000), seed=st.integers(0, 50))
def test_tokens_are_the_longest_front_that_fits(n: int, limit: int, seed: int) -> None:
    table = score_table(n, seed)
    choice = choose(table, SelectConfig(budget_tokens=limit), seed)
    tokens = table.columns["num_tokens"]
    order = np.argsort(choice.rank)
    count = len(choice.chosen)
    assert choice.report["budget"]["tokens"] == tokens[order[:count]].sum() <= limit
    assert count == n or tokens[order[: count + 1]].sum() > limit


def test_tokens_too_few_for_one_sample() -> None:
    with pytest.raises(UserError, match=r"room for the first sample's \d+ tokens; found 3"):
        choose(score_table(30), SelectConfig(budget_tokens=3), 0)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_strata_get_their_shares_at_every_budget(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    order = np.random.default_rng(seed).permutation(len(strata))
    k = data.draw(st.integers(1, len(strata)))
    fair = spread(order, strata, "proportional")
    assert sorted(fair.tolist()) == list(range(len(strata)))
    got = np.bincount(strata[fair[:k]], minlength=len(sizes))
    # Webster's rule, seat by seat; between equals whoever's next sample stands first
    want = [0] * len(sizes)
    for _ in range(k):
        claims = [
            ((want[s] + 0.5) / sizes[s], int(np.flatnonzero(strata[order] == s)[want[s]]), s)
            for s in range(len(sizes))
            if want[s] < sizes[s]
        ]
        want[min(claims)[2]] += 1
    assert got.tolist() == want
    even = np.bincount(strata[spread(order, strata, "equal")[:k]], minlength=len(sizes))
    unfilled = even < np.array(sizes)
    if unfilled.any():
        assert np.ptp(even[unfilled]) <= 1
        assert even.max() - even[unfilled].min() <= 1
    for stratum in range(len(sizes)):  # within a stratum the order of preference stands
        mine = fair[strata[fair] == stratum]
        assert mine.tolist() == order[strata[order] == stratum].tolist()


def test_auto_of_equal_gains_keeps_everyone() -> None:
    assert above_mean(np.full(7, 2.0)) == 7
    assert above_mean(np.array([1.0, 1.0, 1.0, 9.0])) == 1
