"""A signal is believed where the controls show that it sees, and only there; what is rejected has a
reason; what is blind leaves a random choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.baselines import length_bins
from grads_ds.selection.choose import Choice, choose
from grads_ds.selection.control_areas import within_length
from grads_ds.selection.filters import auto_cut
from grads_ds.selection.guided import guided
from grads_ds.statistics import area_under_curve
from selection.pools import score_table

N = 600


def pool_with_controls(
    gap: float, share: float = 0.2, seed: int = 0, with_general: bool = True
) -> tuple[ScoreTable, np.ndarray]:
    """A pool of which `share` are wrong: their ifd lies `gap` above what rows of their length have;
    controls as the wrong rows are. ifd falls with length far more than it tells right from wrong.
    """
    draw = np.random.default_rng(seed)
    wrong = draw.random(N) < share

    def column(bad: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return draw.normal(gap * bad, 1.0) - 20 * np.log(tokens)

    table = score_table(N, seed)
    tokens = table.floats("num_target_tokens")
    table = replace(table, columns={**table.columns, "ifd": column(wrong, tokens)})
    control = score_table(80, seed + 1)
    of_controls = column(np.ones(80, bool), control.floats("num_target_tokens"))
    control = replace(control, columns={**control.columns, "ifd": of_controls})
    blind = score_table(40, seed + 2)
    blind_ifd = column(np.zeros(40, bool), blind.floats("num_target_tokens"))
    blind = replace(blind, columns={**blind.columns, "ifd": blind_ifd})
    controls = {"swapped": control} | ({"general": blind} if with_general else {})
    return replace(table, controls=controls), wrong


def chosen(table: ScoreTable, **settings: Any) -> Choice:
    picked = SelectConfig(**{"method": "guided"} | settings)
    strata = length_bins(table.floats("num_target_tokens"), 10)
    return choose(table, picked, 0, strata)


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
    by_rank, by_chance = chosen(table, budget=0.25), chosen(table, budget=0.25, spread="random")
    assert wrong[by_rank.selected].mean() < wrong[by_chance.selected].mean() < wrong.mean()
    strata = length_bins(table.floats("num_target_tokens"), 10)
    counts = np.bincount(strata[by_rank.selected], minlength=10)
    left = np.bincount(strata[chosen(table, budget="auto").selected], minlength=10)
    np.testing.assert_allclose(counts, left * counts.sum() / left.sum(), atol=1.0)


def test_nearness_to_the_reference_set_orders_what_the_filters_leave() -> None:
    table, wrong = pool_with_controls(gap=5.0)
    near = np.random.default_rng(9).random(N)
    with pytest.raises(UserError, match=r"add contrast to probe\.extras"):
        chosen(table, budget=0.25, spread="reference")
    table = replace(table, columns={**table.columns, "anchor_hidden_cosine": near})
    plain, nearest = chosen(table, budget=0.25), chosen(table, budget=0.25, spread="reference")
    assert near[nearest.selected].mean() > near[plain.selected].mean() + 0.15
    assert wrong[nearest.selected].mean() < 0.03
    assert nearest.report["notes"]["nearness"] == ["anchor_hidden_cosine"]


def with_reference(
    share: float, known: int, gap: float = 6.0, seed: int = 0
) -> tuple[ScoreTable, np.ndarray]:
    """A pool whose ifd is blind, of which `share` lie `gap` further from the reference set than its
    own rows do.
    """
    draw = np.random.default_rng(seed)
    table, _ = pool_with_controls(gap=0.0, with_general=False, seed=seed)
    off = draw.random(N) < share
    near = draw.normal(-gap * off, 1.0)
    control = score_table(known, seed + 3)
    own = {"anchor_hidden_cosine": draw.normal(0.0, 1.0, known), "ifd": np.zeros(known)}
    controls = {"reference": replace(control, columns={**control.columns, **own})}
    table = replace(table, columns={**table.columns, "anchor_hidden_cosine": near})
    return replace(table, controls=dict(table.controls) | controls), off


def test_rows_unlike_the_reference_rows_are_rejected_and_few_others() -> None:
    lost, found, rejected = [], [], 0
    for seed in range(20):
        table, off = with_reference(share=0.15, known=32, seed=seed)
        choice = chosen(table, budget="auto", spread="reference")
        (entry,) = choice.report["filters"]
        assert (entry["column"], entry["reject"]) == ("anchor_hidden_cosine", "low")
        assert entry["false_rejection"] == pytest.approx(1 / 33, abs=1e-4)
        out = np.array(["unlike the reference" in choice.reasons[i] for i in choice.reason])
        assert entry["rejected"] == out.sum()
        lost.append(out[~off].mean())
        found.append(out[off].mean())
        rejected += entry["rejected"]
    assert np.mean(lost) < 0.05 and np.mean(found) > 0.9 and rejected
    # only where nearness is wanted, or by name
    table, off = with_reference(share=0.15, known=32)
    assert chosen(table, budget=0.5).report["filters"] == []
    named = [{"column": "anchor_hidden_cosine", "against": "reference", "by_length": False}]
    assert chosen(table, budget=0.5, filters=named).report["filters"][0]["rejected"] > 50


def test_where_most_of_the_pool_is_unlike_the_reference_rows_their_share_is_kept() -> None:
    table, off = with_reference(share=0.9, known=32)
    choice = chosen(table, budget="auto", spread="reference")
    (entry,) = choice.report["filters"]
    assert abs(entry["estimated_share"] - (~off).mean()) < 0.06
    assert (~off)[choice.selected].mean() > 0.95
    assert choice.selected.sum() > 0.8 * (~off).sum()


def test_in_a_needle_pool_a_budget_takes_the_nearest_rows_of_any_length() -> None:
    table, off = with_reference(share=0.9, known=32)
    near = table.floats("anchor_hidden_cosine")
    needles = int((~off).sum())
    choice = chosen(table, budget=needles, spread="reference")
    assert choice.report["filters"] == [] and choice.report["notes"]["needles"] is True
    np.testing.assert_array_equal(choice.chosen, np.argsort(-near, kind="stable")[:needles])
    assert (~off)[choice.selected].mean() > 0.95


def test_a_row_is_as_good_as_the_signal_that_thinks_least_of_it() -> None:
    table, _ = with_reference(share=0.0, known=32)
    draw = np.random.default_rng(3)
    ifd, near = draw.normal(size=N), draw.normal(size=N)
    control = score_table(80, 1)
    bad = replace(control, columns={**control.columns, "ifd": draw.normal(9.0, 1.0, 80)})
    columns = {**table.columns, "ifd": ifd, "anchor_hidden_cosine": near}
    table = replace(table, columns=columns, controls={**table.controls, "swapped": bad})
    order = guided(table, SelectConfig(method="guided", spread="reference"), 0).preference
    lengths = table.floats("num_target_tokens")
    worst = np.minimum(
        1 - within_length(ifd, lengths, ifd, lengths), within_length(near, lengths, near, lengths)
    )
    np.testing.assert_allclose(order, worst, atol=1e-6)


def test_few_reference_rows_make_no_cut_and_it_says_how_many_would() -> None:
    table, _ = with_reference(share=0.15, known=12)
    (entry,) = chosen(table, budget=0.5, spread="reference").report["filters"]
    assert entry["rejected"] == 0 and "12 reference rows; 19 allow a cut" in entry["why_none"]


def test_the_reference_rows_are_no_kind_that_is_wrong() -> None:
    table, _ = with_reference(share=0.5, known=32)
    choice = chosen(table, budget=0.5)
    assert set(choice.report["signals"]["best"]) == {"swapped"}
    assert "reference" in choice.report["signals"]["controls"]
    table = replace(table, controls={"reference": table.controls["reference"]})
    with pytest.raises(UserError, match="controls"):
        chosen(table, filters=[{"column": "ifd"}])


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
