"""What must hold of every choice: the budget met exactly, nested budgets nested, nothing depends on
row order, units or columns given twice, ties go by id, and odd tables are handled as documented.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import from_arrow
from grads_ds.selection.choose import choose
from selection.picks import ids, pick
from selection.pools import arrow_table, score_table

GRADS = [
    {"signal": signal, "region": region, "scale": scale}
    for signal in ("sum", "product", "l2", "zscore", "joint", "lm_head")
    for region in ("density", "magnitude", "mass", "band", "sample")
    for scale in ("log", "linear")
]
RIVALS = [
    {"method": name}
    for name in (
        "random",
        "length_matched",
        "loss",
        "perplexity_band",
        "length",
        "grand",
        "k_center",
    )
] + [{"method": "mixture", "mixture": {"loss": 1.0, "grads": 2.0}}]
ANY_METHOD = st.sampled_from(
    [*GRADS, *RIVALS, {"length_correction": True}, {"bandwidth": "isj", "region": "density"}]
)


@settings(max_examples=40, deadline=None)
@given(method=ANY_METHOD, n=st.integers(2, 300), seed=st.integers(0, 99), data=st.data())
def test_budget_is_met_exactly_and_budgets_are_nested(
    method: dict[str, Any], n: int, seed: int, data: st.DataObject
) -> None:
    table = score_table(n, seed)
    small = data.draw(st.integers(2, n))
    large = data.draw(st.integers(small, n))
    one, two = (pick(table, seed, budget=k, **method) for k in (small, large))
    assert len(one.chosen) == len(set(ids(one))) == small
    assert len(two.chosen) == large
    assert ids(two)[:small] == ids(one)
    assert one.selected.sum() == small
    np.testing.assert_array_equal(one.rank[one.chosen], np.arange(1, small + 1))


def alike(row: int, accepted: list[int]) -> int | None:
    """Rows are near-duplicates of the accepted row with the same third."""
    like = next((other for other in accepted if other // 3 == row // 3), None)
    if like is None:
        accepted.append(row)
    return like


@settings(max_examples=40, deadline=None)
@given(
    method=ANY_METHOD,
    n=st.integers(6, 200),
    seed=st.integers(0, 99),
    equal=st.booleans(),
    data=st.data(),
)
def test_budgets_are_nested_with_strata_and_near_duplicates_too(
    method: dict[str, Any], n: int, seed: int, equal: bool, data: st.DataObject
) -> None:
    table = score_table(n, seed)
    strata = np.random.default_rng(seed).integers(0, 4, n)
    small = data.draw(st.integers(2, n // 3))
    large = data.draw(st.integers(small, n // 3))
    found = []
    for budget in (small, large):
        accepted: list[int] = []
        wanted = SelectConfig(
            budget=budget, strata_balance="equal" if equal else "proportional", **method
        )
        found.append(
            choose(table, wanted, seed, strata, lambda row, accepted=accepted: alike(row, accepted))
        )
    assert [len(choice.chosen) for choice in found] == [small, large]  # dropped twins are replaced
    assert ids(found[1])[:small] == ids(found[0])
    assert len({i // 3 for i in ids(found[1])}) == large


@settings(max_examples=40, deadline=None)
@given(method=ANY_METHOD, n=st.integers(2, 300), seed=st.integers(0, 99))
def test_row_order_changes_nothing(method: dict[str, Any], n: int, seed: int) -> None:
    table = arrow_table(n, seed)
    mixed = table.take(pa.array(np.random.default_rng(seed).permutation(n)))
    one, two = (pick(from_arrow(t), seed, budget=0.3, **method) for t in (table, mixed))
    assert ids(one) == ids(two)
    np.testing.assert_array_equal(one.signal, two.signal)


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from([m for m in GRADS if "signal" in m]),
    n=st.integers(2, 300),
    seed=st.integers(0, 99),
    units=st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)),
)
def test_the_unit_of_each_norm_changes_nothing(
    method: dict[str, Any], n: int, seed: int, units: tuple[float, float]
) -> None:
    table = score_table(n, seed)
    scaled = score_table(
        n,
        seed,
        embedding_grad_norm=units[0] * table.norms("embedding"),
        lm_head_grad_norm=units[1] * table.norms("lm_head"),
    )
    assert ids(pick(table, budget=0.3, **method)) == ids(pick(scaled, budget=0.3, **method))


@settings(max_examples=30, deadline=None)
@given(
    region=st.sampled_from(["density", "magnitude", "mass", "band", "sample"]),
    signal=st.sampled_from(["sum", "product", "l2"]),
    scale=st.sampled_from(["log", "linear"]),
    n=st.integers(2, 300),
)
def test_a_duplicated_column_changes_nothing(region: str, signal: str, scale: str, n: int) -> None:
    table = score_table(n, lm_head_grad_norm=score_table(n).norms("embedding"))
    both = pick(table, budget=0.3, signal=signal, region=region, scale=scale)
    alone = pick(table, budget=0.3, signal="embedding", region=region, scale=scale)
    assert ids(both) == ids(alone)


@pytest.mark.parametrize("method", [*GRADS[:10], *RIVALS], ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_all_equal_and_all_zero_norms(method: dict[str, Any], value: float) -> None:
    n = 50
    same = {"embedding_grad_norm": np.full(n, value), "lm_head_grad_norm": np.full(n, value)}
    same |= {"loss": np.ones(n), "num_target_tokens": np.full(n, 9), "num_tokens": np.full(n, 12)}
    choice = pick(score_table(n, **same), budget=7, **method)
    assert len(choice.chosen) == 7
    seeded = method.get("method") in ("random", "perplexity_band") or method.get("region") in (
        "band",
        "sample",
    )
    if not seeded:
        assert ids(choice) == list(range(7))  # ties go to the lowest ids
        assert (
            any("same preference" in text for text in choice.warnings)
            or method.get("method") == "k_center"
        )


def test_ties_at_the_threshold_go_by_id() -> None:
    n = 10
    table = score_table(n, loss=np.array([1.0, 5, 5, 5, 5, 5, 1, 9, 1, 1]))
    choice = pick(table, budget=4, method="loss")
    assert ids(choice) == [7, 1, 2, 3]
    assert "further back" in choice.reasons[choice.reason[4]]


@pytest.mark.parametrize("method", [*GRADS[:10], *RIVALS], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_sample_tables(method: dict[str, Any], n: int) -> None:
    assert len(pick(score_table(n), budget=0.01, **method).chosen) == 1
    assert sorted(ids(pick(score_table(n), budget=1.0, **method))) == list(range(n))


@pytest.mark.parametrize("method", [*GRADS, *RIVALS], ids=str)
def test_flagged_samples_are_counted_and_never_chosen(method: dict[str, Any]) -> None:
    n = 40
    status = ["ok"] * n
    status[3], status[4], status[5] = "no_target", "nonfinite", "nonfinite"
    norms = score_table(n).norms("embedding")
    norms[4:7] = [np.nan, np.inf, np.nan]  # 6 is called ok, yet has no score
    norms[3] = 0.0
    choice = pick(score_table(n, status=status, embedding_grad_norm=norms), budget=1.0, **method)
    assert not {3, 4, 5, 6} & set(ids(choice))
    assert len(choice.chosen) == n - 4
    assert choice.report["counts"]["by_status"] == {"no_target": 1, "nonfinite": 2, "ok": n - 3}
    said = [choice.reasons[choice.reason[i]] for i in (3, 4, 6)]
    assert said == ["out: status no_target", "out: status nonfinite", "out: scores are not finite"]
    assert any("36 can be chosen" in text for text in choice.warnings)
    assert choice.rank[3] == 0


def test_flagged_samples_do_not_bend_the_density() -> None:
    n = 60
    status = ["ok"] * 50 + ["no_target"] * 10
    norms = np.concatenate([score_table(50).norms("embedding"), np.zeros(10)])
    heads = np.concatenate([score_table(50).norms("lm_head"), np.zeros(10)])
    flagged = pick(
        score_table(n, status=status, embedding_grad_norm=norms, lm_head_grad_norm=heads), budget=9
    )
    assert ids(flagged) == ids(pick(score_table(50), budget=9))


def test_no_sample_to_choose_from() -> None:
    with pytest.raises(UserError, match=r"at least one sample of status ok.*'no_target': 2"):
        pick(score_table(2, status=["no_target", "no_target"]))
    with pytest.raises(UserError, match="empty score table"):
        score_table(0)


def test_a_sample_held_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 repeated, the first sample_id 4"):
        score_table(5, sample_id=np.array([0, 4, 2, 4, 1]))
