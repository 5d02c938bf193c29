"""On norms drawn from a known distribution, what `choose` takes approaches the region that the
distribution's formula gives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import chi2, norm

from grads_ds.config.select import SelectConfig
from grads_ds.selection.choose import choose
from selection.pools import score_table

MIXTURE = ((0.7, 0.0, 0.4), (0.3, 2.5, 0.6))  # weight, mean, deviation of the log norm: two modes
LINE = np.linspace(-4, 8, 240_001)
SIZES, SEEDS = (1_000, 10_000, 100_000), range(4)


def pdf(x: np.ndarray) -> np.ndarray:
    return sum((w * norm.pdf(x, m, s) for w, m, s in MIXTURE), np.zeros_like(x))


def cdf(x: float) -> float:
    return float(sum(w * norm.cdf(x, m, s) for w, m, s in MIXTURE))


def quantile(share: float) -> float:
    return float(brentq(lambda x: cdf(x) - share, -10, 15))


def level(preference: Callable[[np.ndarray], np.ndarray], share: float) -> float:
    """The preference that `share` of the distribution exceeds."""
    values, mass = preference(LINE), pdf(LINE) * (LINE[1] - LINE[0])
    return float(brentq(lambda edge: mass[values >= edge].sum() - share, 1e-9, values.max() - 1e-9))


def massive(x: np.ndarray) -> np.ndarray:
    return pdf(x) * np.exp(x)


def draw(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    which = rng.choice(len(MIXTURE), n, p=[w for w, _, _ in MIXTURE])
    return (
        np.array([m for _, m, _ in MIXTURE])[which]
        + rng.normal(size=n) * np.array([s for _, _, s in MIXTURE])[which]
    )


# settings, budget (one whose edges lie on slopes: where the preference is flat, the smallest error
# moves them), truth
REGIONS: dict[str, tuple[dict[str, object], float, Callable[[np.ndarray, float], np.ndarray]]] = {
    "density": ({"region": "density"}, 0.6, lambda x, share: pdf(x) >= level(pdf, share)),
    "mass": ({"region": "mass"}, 0.6, lambda x, share: massive(x) >= level(massive, share)),
    "magnitude": ({"region": "magnitude"}, 0.4, lambda x, share: x >= quantile(1 - share)),
    # a band that holds the budget exactly, so that which of its samples are drawn does not matter
    "band": (
        {"region": "band", "band": (0.2, 0.6)},
        0.4,
        lambda x, share: (x >= quantile(0.2)) & (x <= quantile(0.2 + share)),
    ),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_of_a_known_mixture_is_the_analytic_one(name: str) -> None:
    settings, share, truth = REGIONS[name]
    wrong = []
    for n in SIZES:
        misplaced = []
        for seed in SEEDS:
            logs = draw(n, seed)
            table = score_table(n, embedding_grad_norm=np.exp(logs))
            chosen = choose(
                table,
                SelectConfig(signal="embedding", budget=share, bandwidth="isj", **settings),
                0,
            ).selected
            misplaced.append(np.mean(chosen != truth(logs, share)))
        wrong.append(float(np.mean(misplaced)))
    assert wrong[2] < wrong[1] < wrong[0]
    assert wrong[2] < 0.01 * share


def test_the_joint_region_of_a_normal_is_its_ellipse() -> None:
    """Norms of two groups, correlated, of different spread: the highest-density half lies within
    Mahalanobis distance chi2.
    """
    correlation, spreads, share = 0.6, (0.5, 1.5), 0.5
    wrong = []
    for n in SIZES:
        misplaced = []
        for seed in SEEDS:
            rng = np.random.default_rng(seed)
            a = rng.normal(size=n)
            b = correlation * a + np.sqrt(1 - correlation**2) * rng.normal(size=n)
            table = score_table(
                n,
                embedding_grad_norm=np.exp(spreads[0] * a),
                lm_head_grad_norm=np.exp(spreads[1] * b),
            )
            chosen = choose(table, SelectConfig(signal="joint", budget=share), 0).selected
            distance = (a**2 - 2 * correlation * a * b + b**2) / (1 - correlation**2)
            misplaced.append(np.mean(chosen != (distance <= chi2.ppf(share, 2))))
        wrong.append(float(np.mean(misplaced)))
    assert wrong[2] < wrong[1] < wrong[0]
    assert wrong[2] < 0.06 * share


def test_sampling_draws_in_proportion_to_the_density() -> None:
    """At a small budget the chosen are distributed as density squared: the pool's own density times
    the chance of being drawn.
    """
    n = 200_000
    logs = draw(n, 0)
    table = score_table(n, embedding_grad_norm=np.exp(logs))
    chosen = logs[
        choose(table, SelectConfig(signal="embedding", budget=0.01, region="sample"), 0).chosen
    ]
    squared = pdf(LINE) ** 2
    law = np.cumsum(squared) / squared.sum()
    distance = np.abs(
        np.searchsorted(np.sort(chosen), LINE, side="right") / len(chosen) - law
    ).max()
    assert distance < 1.63 / np.sqrt(len(chosen))  # Kolmogorov-Smirnov at 1 %
