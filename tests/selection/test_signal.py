"""Each combination is its formula; zeros, equal columns and length behave as documented."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.signal import build_signal, positive, robust_z, without_length
from grads_ds.statistics import spearman
from selection.pools import score_table

TABLE = score_table(201)  # odd: the lower median is the median


def slow(signal: str, scale: str) -> list[float]:
    """The definitions, one sample at a time."""
    columns = [TABLE.norms("embedding").tolist(), TABLE.norms("lm_head").tolist()]
    columns = [[a / statistics.median(column) for a in column] for column in columns]
    out = []
    for a, b in zip(*columns, strict=True):
        value = {
            "sum": (a + b) / 2,
            "product": math.sqrt(a * b),
            "l2": math.sqrt((a * a + b * b) / 2),
            "embedding": a,
            "lm_head": b,
        }[signal]
        out.append(math.log(value) if scale == "log" else value)
    return out


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("signal", ["sum", "product", "l2", "embedding", "lm_head"])
def test_combination_is_its_formula(signal: str, scale: str) -> None:
    got = build_signal(TABLE, SelectConfig(signal=signal, scale=scale))
    np.testing.assert_allclose(got.values, slow(signal, scale), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(got.magnitude, slow(signal, "linear"), rtol=1e-8)


def test_zscore_is_the_mean_of_robust_scores() -> None:
    got = build_signal(TABLE, SelectConfig(signal="zscore")).values
    parts = []
    for group in ("embedding", "lm_head"):
        logs = [math.log(a) for a in TABLE.norms(group)]
        middle = statistics.median(logs)
        mad = statistics.median(abs(a - middle) for a in logs)
        parts.append([(a - middle) / (1.4826 * mad) for a in logs])
    np.testing.assert_allclose(got, [(a + b) / 2 for a, b in zip(*parts, strict=True)], atol=1e-8)


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("signal", ["sum", "product", "l2", "zscore", "joint"])
def test_a_column_given_twice_changes_nothing(signal: str, scale: str) -> None:
    twice = score_table(301, lm_head_grad_norm=score_table(301).columns["embedding_grad_norm"])
    got = build_signal(twice, SelectConfig(signal=signal, scale=scale)).values
    alone = build_signal(twice, SelectConfig(signal="embedding", scale=scale)).values
    if signal in ("zscore", "joint"):
        alone = robust_z(alone)
    np.testing.assert_allclose(got, alone, atol=1e-8)


def test_standardisation_keeps_a_large_group_from_drowning_a_small_one() -> None:
    columns = {
        "embedding_grad_norm": 1e-4 * TABLE.norms("embedding"),
        "lm_head_grad_norm": TABLE.norms("lm_head"),
    }
    table = score_table(201, **columns)
    plain = build_signal(table, SelectConfig(signal="sum", standardise="none")).values
    fair = build_signal(table, SelectConfig(signal="sum")).values
    assert spearman(plain, table.norms("lm_head")) == 1.0
    np.testing.assert_allclose(
        fair, build_signal(TABLE, SelectConfig(signal="sum")).values, atol=1e-6
    )


def test_zero_norms_have_a_place_on_the_log_scale() -> None:
    norms = np.array([0.0, 2.0, 0.5, 0.0, 8.0])
    np.testing.assert_array_equal(positive(norms), [0.5, 2.0, 0.5, 0.5, 8.0])
    np.testing.assert_array_equal(positive(np.zeros(3)), np.ones(3))
    got = build_signal(
        score_table(5, embedding_grad_norm=norms), SelectConfig(signal="embedding", scale="linear")
    )
    assert got.zero == 0.0
    assert got.values[0] == got.values[3] == 0.0


def test_norms_far_below_the_median_keep_their_order_on_the_log_scale() -> None:
    norms = np.array([1e-30, 1e-20, 1.0, 1.0, 1.0, 1e25])
    got = build_signal(
        score_table(6, embedding_grad_norm=norms), SelectConfig(signal="embedding")
    ).values
    np.testing.assert_allclose(got, np.log(norms), rtol=1e-9, atol=1e-9)


def test_length_correction_removes_the_trend_and_only_that() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 2000, 5000).astype(float)
    own = np.exp(rng.normal(0, 0.3, 5000))
    corrected, slope = without_length(own * tokens**-0.7, tokens)
    assert slope == pytest.approx(-0.7, abs=0.01)
    assert abs(spearman(corrected, tokens) or 0.0) < 0.03
    assert (spearman(corrected, own) or 0.0) > 0.999


def test_length_correction_of_equal_lengths_is_none() -> None:
    norms = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(without_length(norms, np.full(3, 7.0))[0], norms)


def test_a_group_that_was_not_recorded_is_named() -> None:
    with pytest.raises(
        UserError, match=r"total_grad_norm.*found.*lm_head_grad_norm.*probe\.layers"
    ):
        build_signal(TABLE, SelectConfig(signal="total"))
