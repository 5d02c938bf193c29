"""With a reference set guided goes by nearness to it too: rows unlike it are rejected, and a needle
pool is ordered by nearness alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.control_areas import within_length
from grads_ds.selection.guided import guided
from selection.controls import N, chosen, pool_with_controls, with_reference
from selection.pools import score_table


def test_nearness_to_the_reference_set_orders_what_the_filters_leave() -> None:
    table, wrong = pool_with_controls(gap=5.0)
    near = np.random.default_rng(9).random(N)
    with pytest.raises(UserError, match=r"add contrast to probe\.extras"):
        chosen(table, budget=0.25, spread="reference")
    table = replace(table, columns={**table.columns, "anchor_hidden_cosine": near})
    plain, nearest = (chosen(table, budget=0.25, spread=name) for name in ("rank", "reference"))
    assert near[nearest.selected].mean() > near[plain.selected].mean() + 0.15
    assert wrong[nearest.selected].mean() < 0.03
    assert nearest.report["notes"]["nearness"] == ["anchor_hidden_cosine"]


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
    assert chosen(table, budget=0.5, spread="rank").report["filters"] == []
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
