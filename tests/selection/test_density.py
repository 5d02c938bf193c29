"""The density is the kernel density estimate, converges to the truth, and its regions are the
analytic ones.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from grads_ds.selection.density import choose_bandwidth, estimate
from grads_ds.selection.joint_density import estimate_joint


def direct(values: np.ndarray, width: float, mirror_at: float | None = None) -> np.ndarray:
    """The definition: every sample's kernel summed at every sample, mirrored samples included."""
    centres = values if mirror_at is None else np.concatenate([values, 2 * mirror_at - values])
    return norm.pdf((values[:, None] - centres[None, :]) / width).sum(axis=1) / (
        width * len(values)
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 120),
    seed=st.integers(0, 2**32 - 1),
    width=st.floats(0.05, 3.0),
    mirrored=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_fast_density_is_the_sum_of_kernels(
    n: int, seed: int, width: float, mirrored: bool, scale: float
) -> None:
    values = np.abs(np.random.default_rng(seed).normal(size=n)) * scale
    got = estimate(values, width * scale, 0.0 if mirrored else None)
    want = direct(values, width * scale, 0.0 if mirrored else None)
    # binning and interpolation each cost step^2 / 8 times the largest curvature, K(0) / width^3;
    # and the kernel is cut at five bandwidths
    bound = (2 * (1 / 16) ** 2 / 8 + 5e-6) * norm.pdf(0) / (width * scale)
    np.testing.assert_allclose(got.at_samples, want, rtol=0, atol=2 * bound if mirrored else bound)


MIXTURE = ((0.6, -2.0, 0.5), (0.4, 2.0, 1.0))


def mixture_pdf(x: np.ndarray) -> np.ndarray:
    return sum(w * norm.pdf(x, m, s) for w, m, s in MIXTURE)


def draw_mixture(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    first = rng.random(n) < MIXTURE[0][0]
    return np.where(first, rng.normal(-2.0, 0.5, n), rng.normal(2.0, 1.0, n))


def mixture_hdr_level(mass: float) -> float:
    """The density level above which `mass` of the mixture lies, by numerical integration."""
    x = np.linspace(-8, 10, 400_001)
    p = mixture_pdf(x)
    return float(
        brentq(lambda level: np.sum(p[p >= level]) * (x[1] - x[0]) - mass, 1e-6, p.max() - 1e-6)
    )


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9])
def test_highest_density_region_approaches_the_analytic_one(mass: float) -> None:
    level = mixture_hdr_level(mass)
    wrong = []
    for n in (1_000, 10_000, 100_000):
        shares = []
        for seed in range(5):
            values = draw_mixture(n, seed)
            k = round(mass * n)
            chosen = np.argsort(-estimate(values, "isj").at_samples, kind="stable")[:k]
            inside = np.zeros(n, dtype=bool)
            inside[chosen] = True
            shares.append(np.mean(inside != (mixture_pdf(values) >= level)))
        wrong.append(float(np.mean(shares)))
    assert wrong[2] < wrong[1] < wrong[0]
    # misplaced samples, as a share of the chosen; the flat top of a density is the hardest to find
    assert wrong[2] < {0.05: 0.6, 0.5: 0.006, 0.9: 0.008}[mass] * mass


def test_density_error_shrinks_with_the_number_of_samples() -> None:
    errors = []
    for n in (300, 3_000, 30_000, 300_000):
        values = draw_mixture(n, 1)
        errors.append(np.mean(np.abs(estimate(values, "isj").at_samples - mixture_pdf(values))))
    assert all(after < before / 1.5 for before, after in pairwise(errors))


def test_mirror_keeps_the_mass_that_piles_up_at_zero() -> None:
    values = np.random.default_rng(0).exponential(size=50_000)
    near = values < 0.01
    bare, mirrored = estimate(values), estimate(values, mirror_at=0.0)
    assert np.mean(bare.at_samples[near]) < 0.65  # the truth is 1: half of each kernel is lost
    np.testing.assert_allclose(np.mean(mirrored.at_samples[near]), 1.0, atol=0.08)
    assert np.sum(mirrored.curve) * (mirrored.grid[1] - mirrored.grid[0]) == pytest.approx(
        1.0, abs=0.01
    )


def test_rules_of_thumb_and_isj() -> None:
    normal = np.random.default_rng(0).normal(0, 2.0, 10_000)
    assert choose_bandwidth(normal, "silverman")[0] == pytest.approx(
        0.9 * 2.0 * 10_000**-0.2, rel=0.03
    )
    assert choose_bandwidth(normal, "scott")[0] == pytest.approx(2.0 * 10_000**-0.2, rel=0.03)
    far_apart = np.concatenate([normal, normal + 40])
    assert choose_bandwidth(far_apart, "isj")[0] < choose_bandwidth(far_apart, "silverman")[0] / 3
    assert choose_bandwidth(normal, 0.25) == (0.25, [])


def test_isj_gives_way_to_silverman_and_says_so() -> None:
    few = np.array([0.0, 1.0, 3.0])
    width, notes = choose_bandwidth(few, "isj")
    assert width == choose_bandwidth(few, "silverman")[0]
    assert any("Silverman" in note for note in notes)


def test_more_than_half_equal_still_has_a_width() -> None:
    values = np.concatenate([np.zeros(80), np.arange(20.0)])  # the interquartile range is zero
    assert estimate(values).bandwidth > 0


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [5.0] * 100])
def test_equal_values_have_density_one(values: list[float]) -> None:
    got = estimate(np.array(values))
    assert got.bandwidth == 0
    np.testing.assert_array_equal(got.at_samples, 1.0)


def test_outliers_do_not_blow_up_the_grid() -> None:
    values = np.concatenate([np.random.default_rng(0).normal(size=10_000), [1e9, -1e12, 1e300]])
    got = estimate(values)
    assert len(got.grid) <= 2**18 + 100
    assert any("3 samples" in text for text in got.warnings)
    np.testing.assert_allclose(
        got.at_samples[-3:], norm.pdf(0) / (len(values) * got.bandwidth), rtol=1e-6
    )
    inner = estimate(values[:-3], got.bandwidth)
    np.testing.assert_allclose(got.at_samples[:-3], inner.at_samples, rtol=0.01)


def test_joint_density_of_a_correlated_normal() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=40_000)
    y = 0.8 * x + 0.6 * rng.normal(size=40_000)
    got = estimate_joint(x, y).at_samples
    # in the whitened units, which are the data's own here
    truth = norm.pdf(x) * norm.pdf((y - 0.8 * x) / 0.6)
    inside = truth > 0.2 * truth.max()
    assert np.corrcoef(got[inside], truth[inside])[0, 1] > 0.99
    np.testing.assert_allclose(np.median(got[inside] / truth[inside]), 1.0, atol=0.05)


def test_joint_of_one_column_twice_is_the_density_of_that_column() -> None:
    x = np.random.default_rng(0).normal(size=2_000)
    np.testing.assert_array_equal(estimate_joint(x, x.copy()).at_samples, estimate(x).at_samples)
