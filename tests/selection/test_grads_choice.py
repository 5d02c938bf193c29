"""What GrADS chooses: where each region lies, and what weights, budgets and conflict do to it."""

from __future__ import annotations

import numpy as np
import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.choose import choose
from selection.picks import ids, pick
from selection.pools import score_table


def test_region_chooses_where_it_says() -> None:
    table = score_table(2000)
    signal = pick(table, budget=100, region="magnitude").signal
    top = pick(table, budget=100, region="magnitude").chosen
    assert signal[top].min() >= np.sort(signal)[-100]
    dense = pick(table, budget=400, region="density", bandwidth=0.3).chosen
    inside = (signal >= signal[dense].min()) & (signal <= signal[dense].max())
    assert inside.sum() == 400  # one mode: the region is one stretch, with nobody left out of it
    band = pick(table, budget=300, region="band", band=(0.5, 0.75)).chosen
    low, high = np.quantile(signal, [0.5, 0.75])
    assert low <= signal[band].min() <= signal[band].max() <= high
    massive, middle = (
        np.median(signal[pick(table, budget=100, region=r).chosen]) for r in ("mass", "density")
    )
    assert massive > middle


@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_mass_of_log_normal_norms_lies_where_the_formula_says(sigma: float) -> None:
    # density of log a is N(0, sigma^2); times a = exp(log a) it is N(sigma^2, sigma^2) up to a
    # factor
    norms = np.exp(np.random.default_rng(0).normal(0, sigma, 100_000))
    table = score_table(100_000, embedding_grad_norm=norms)
    choice = pick(table, budget=0.3, signal="embedding", region="mass")
    chosen = choice.signal[choice.chosen]
    middle = (chosen.min() + chosen.max()) / 2
    assert middle == pytest.approx(sigma**2, abs=0.05 * sigma)


def test_band_smaller_than_the_budget_grows_at_both_ends() -> None:
    table = score_table(1000)
    choice = pick(table, budget=700, region="band", band=(0.25, 0.75))
    place = np.argsort(np.argsort(choice.signal))[choice.chosen]
    assert 140 <= place.min() <= 160
    assert 840 <= place.max() <= 860


def test_sampling_by_density_prefers_the_dense_and_reaches_the_rare() -> None:
    table = score_table(4000)
    choice = pick(table, budget=400, region="sample")
    density = choice.density
    assert density[choice.chosen].mean() > 1.1 * density.mean()
    assert density[choice.chosen].min() < np.quantile(density, 0.25)
    assert ids(choice) != ids(pick(table, seed=1, budget=400, region="sample"))


def test_forget_less_weight_zero_is_plain_and_weight_turns_from_conflict() -> None:
    n = 1000
    rng = np.random.default_rng(0)
    table = score_table(
        n,
        anchor_cosine_embedding=rng.uniform(-1, 1, n),
        anchor_cosine_lm_head=rng.uniform(-1, 1, n),
    )
    plain, zero = pick(score_table(n), budget=200), pick(table, budget=200, forget_less=0.0)
    assert ids(plain) == ids(zero)
    conflict = (
        np.maximum(0, -table.floats("anchor_cosine_embedding"))
        + np.maximum(0, -table.floats("anchor_cosine_lm_head"))
    ) / 2
    means = [
        conflict[pick(table, budget=200, forget_less=w).chosen].mean() for w in (0.0, 0.5, 2.0)
    ]
    assert means[0] > 1.5 * means[1] > 1.5 * means[2]
    agreeing = score_table(n, anchor_cosine_embedding=np.full(n, 0.3))
    assert set(ids(pick(agreeing, budget=200, forget_less=2.0))) == set(ids(plain))
    with pytest.raises(UserError, match=r"anchor_cosine_<group>.*add anchor to probe.extras"):
        pick(score_table(n), forget_less=1.0)


def test_auto_budget_takes_what_stands_above_the_mean() -> None:
    table = score_table(3000)
    for region in ("density", "mass", "magnitude"):
        choice = pick(table, budget="auto", region=region)
        kept = len(choice.chosen)
        assert 0.2 < kept / 3000 < 0.8
        assert "auto" in choice.report["budget"]["rule"]
    density = pick(table, budget="auto", region="density").density
    assert len(pick(table, budget="auto", region="density").chosen) == np.sum(
        density > density.mean()
    )
    with pytest.raises(UserError, match="auto adapts"):
        pick(table, budget="auto", method="random")


def test_weights_have_mean_one_and_even_out_the_density() -> None:
    table = score_table(500)
    even = pick(table, budget=100, weights="inverse_density", region="sample")
    assert even.weight.sum() == pytest.approx(100)
    assert (even.weight[~even.selected] == 0).all()
    np.testing.assert_allclose(np.ptp((even.weight * even.density)[even.chosen]), 0, atol=1e-9)
    falling = pick(table, budget=100, weights="preference").weight
    assert (np.diff(falling[pick(table, budget=100).chosen]) < 0).all()
    with pytest.raises(UserError, match="wants a method with a density"):
        pick(table, method="loss", weights="inverse_density")


def test_a_signal_that_is_only_length_and_tied_groups_are_said() -> None:
    n = 300
    tokens = np.random.default_rng(0).integers(5, 500, n)
    like_length = (tokens**-0.5).astype(np.float32)
    table = score_table(
        n, num_target_tokens=tokens, embedding_grad_norm=like_length, lm_head_grad_norm=like_length
    )
    said = " | ".join(pick(table).warnings)
    assert "mostly length: rank correlation -1.00" in said
    assert "length_correction: true" in said
    assert "groups embedding, lm_head have the same norms" in said
    assert pick(score_table(n)).warnings == []


def test_tokens_of_dropped_near_duplicates_are_free_again() -> None:
    n = 12
    table = score_table(n, num_tokens=np.full(n, 10), loss=np.arange(n, 0, -1.0))
    kept: list[int] = []

    def pairs_alike(row: int) -> int | None:
        if row % 2:
            return row - 1
        kept.append(row)
        return None

    choice = choose(
        table, SelectConfig(method="loss", budget_tokens=45), 0, seen_before=pairs_alike
    )
    assert ids(choice) == kept == [0, 2, 4, 6]
    assert choice.report["budget"]["tokens"] == 40
