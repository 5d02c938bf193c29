"""A signal is believed where the controls show that it sees, and only there; what is rejected has a
reason; what is blind leaves a random choice.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.baselines import length_bins
from grads_ds.selection.choose import choose
from grads_ds.selection.control_areas import within_length
from grads_ds.selection.filters import auto_cut
from grads_ds.statistics import area_under_curve
from selection.controls import N, chosen, pool_with_controls


def test_what_the_controls_tell_is_rejected_with_its_reason() -> None:
    table, wrong = pool_with_controls(gap=5.0)
    choice = chosen(table, budget="auto")
    kept = choice.selected
    assert (~wrong[kept]).mean() > 0.97
    assert (kept & ~wrong).sum() > 0.9 * (~wrong).sum()
    (entry,) = choice.report["filters"]
    assert (entry["column"], entry["reject"], entry["against"]) == ("ifd", "high", "swapped")
    assert abs(entry["estimated_share"] - wrong.mean()) < 0.05
    reasons = [choice.reasons[i] for i in choice.reason[~kept]]
    assert all("ifd among rows of like length from" in reason for reason in reasons)
    assert choice.report["counts"]["rejected_by_filters"] == len(reasons) == entry["rejected"]
    assert "no filter rejects" in choice.report["budget"]["rule"]


def test_a_small_budget_takes_the_rows_that_look_least_wrong_in_every_length() -> None:
    table, wrong = pool_with_controls(gap=2.5, share=0.25)
    by_rank, by_chance = (chosen(table, budget=0.25, spread=name) for name in ("rank", "random"))
    assert wrong[by_rank.selected].mean() < wrong[by_chance.selected].mean() < wrong.mean()
    strata = length_bins(table.floats("num_target_tokens"), 10)
    counts = np.bincount(strata[by_rank.selected], minlength=10)
    left = np.bincount(strata[chosen(table, budget="auto").selected], minlength=10)
    np.testing.assert_allclose(counts, left * counts.sum() / left.sum(), atol=1.0)


def test_doubt_is_as_random_as_the_pool_is_clean() -> None:
    for share in (0.0, 0.25):
        table, wrong = pool_with_controls(gap=2.5, share=share)
        doubt, rank = (chosen(table, budget=0.25, spread=name) for name in ("doubt", "rank"))
        assert wrong[doubt.selected].mean() <= wrong.mean() / 5
        doubted = doubt.report["notes"]["doubted"] / N
        # a clean pool's rows are doubted for the estimate's noise alone
        assert 0.4 < doubted < 0.9 if share else doubted < 0.25
        both = (doubt.selected & rank.selected).sum() / rank.selected.sum()
        assert both > 0.5 if share else both < 0.4
    # a budget beyond what nobody doubts goes on with the least doubted
    wide, drawn = (chosen(table, budget=0.6, spread=name) for name in ("doubt", "random"))
    assert wrong[wide.selected].mean() < wrong[drawn.selected].mean()


def test_blind_signals_reject_nothing_and_leave_a_random_choice_that_says_so() -> None:
    table, _ = pool_with_controls(gap=0.0)
    choice = chosen(table, budget=0.25)
    assert choice.report["filters"] == [] and choice.report["counts"]["rejected_by_filters"] == 0
    assert any("random choice in strata of length" in text for text in choice.warnings)
    assert set(choice.report["signals"]["best"].values()) == {None}
    random = choose(
        table,
        SelectConfig(method="random", budget=0.25),
        0,
        length_bins(table.floats("num_target_tokens"), 10),
    )
    assert np.array_equal(choice.selected, random.selected)
    # a filter that is asked for by name is held to the same rule
    named = chosen(table, budget=0.25, filters=[{"column": "ifd"}])
    assert "blind" in named.report["filters"][0]["why_none"]


def test_a_clean_pool_loses_next_to_nothing() -> None:
    table, _ = pool_with_controls(gap=4.0, share=0.0)
    choice = chosen(table, budget="auto")
    assert choice.selected.mean() > 0.97


def test_a_filter_with_side_and_cut_needs_no_controls_and_serves_every_method() -> None:
    table, _ = pool_with_controls(gap=0.0)
    table = replace(table, controls={})
    cut = {"column": "loss", "reject": "high", "cut": float(np.median(table.floats("loss")))}
    choice = chosen(table, method="random", budget=1.0, filters=[cut | {"by_length": False}])
    assert choice.selected.sum() == np.count_nonzero(table.floats("loss") < cut["cut"])
    assert choice.report["signals"] is None
    for settings in ({"filters": [{"column": "loss"}]}, {"method": "guided"}):
        with pytest.raises(UserError, match="controls"):
            chosen(table, **settings)
    with pytest.raises(UserError, match="wanted column ifdd"):
        chosen(table, filters=[{"column": "ifdd", "reject": "low", "cut": 1.0}])


@pytest.mark.parametrize("gap", [1.5, 3.0])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_cut_costs_what_it_says(gap: float, share: float) -> None:
    draw = np.random.default_rng(3)
    wrong = draw.random(20_000) < share
    pool, controls = draw.normal(gap * wrong, 1.0), draw.normal(gap, 1.0, 5_000)
    cut, estimated, false = auto_cut(pool, controls)
    assert share - 0.02 < estimated < share + 0.12
    if cut is None:
        return
    true_false = (pool[~wrong] >= cut).mean()
    assert false <= true_false + 0.02
    # more often wrong than right at the estimated share, and in truth as far as that is right
    assert wrong[pool >= cut].mean() > 0.5 * share / estimated - 0.01


def test_rows_of_like_length_are_compared_one_by_one() -> None:
    draw = np.random.default_rng(0)
    lengths, values = (
        draw.integers(1, 90, 200).astype(float),
        draw.integers(0, 9, 200).astype(float),
    )
    found = within_length(values, lengths, values, lengths)
    order = np.argsort(lengths, kind="stable")
    for row in range(0, 200, 7):
        middle = (np.sum(lengths < lengths[row]) + np.sum(lengths <= lengths[row])) // 2
        start = int(np.clip(middle - 30, 0, 200 - 61))
        near = values[order[start : start + 61]]
        share = (near < values[row]).mean() + 0.5 * (near == values[row]).mean()
        assert found[row] == pytest.approx(share)
    assert np.isnan(within_length(np.array([np.nan]), np.ones(1), values, lengths)).all()


def test_the_area_under_the_curve_counts_pairs() -> None:
    high, low = np.array([3.0, 1.0, np.nan, 2.0]), np.array([1.0, 0.0, 2.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in (3.0, 1.0, 2.0) for b in low]
    assert area_under_curve(high, low) == pytest.approx(np.mean(pairs))
    assert area_under_curve(np.array([np.nan]), low) is None
