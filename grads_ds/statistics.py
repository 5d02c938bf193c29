"""Statistics that several stages share: shares of ranks, rank correlation, area under the curve,
bootstrap intervals and the one mixing function. No torch import.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def rank_shares(scores: Floats) -> Floats:
    """Each score's place as a share in (0, 1): equal scores share their mean place.

    NaN stays NaN.
    """
    from scipy.stats import rankdata  # slow to import

    good = np.isfinite(scores)
    shares = np.full(len(scores), np.nan)
    values = scores[good]
    if len(values):
        shares[good] = (rankdata(values) - 0.5) / len(values)
    return shares


def area_under_curve(high: Floats, low: Floats) -> float | None:
    """The chance that a value of `high` exceeds one of `low` (equal: half), the area under the ROC
    curve; None where either has no finite value.
    """
    high, low = high[np.isfinite(high)], np.sort(low[np.isfinite(low)])
    if not len(high) or not len(low):
        return None
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean()) / (2 * len(low))


def bootstrap_interval(
    values: Floats, resamples: int, seed: int, weights: Floats | None = None, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of this level (percentile method) of the weighted mean of `values` [N],
    samples redrawn whole. One seed redraws the same samples whatever the values are, so that
    intervals of two models compare. `weights` [N]: of the mean, e.g. target tokens (default: all
    alike).
    """
    weights = np.ones(len(values)) if weights is None else weights
    sums, rng = values * weights, np.random.default_rng(seed)
    found = np.empty(resamples)
    block = max(1, 2**22 // len(values))  # redrawn at a time: memory stays bounded
    for first in range(0, resamples, block):
        draws = rng.integers(len(values), size=(min(block, resamples - first), len(values)))
        total = np.maximum(1, weights[draws].sum(axis=1))
        found[first : first + len(draws)] = sums[draws].sum(axis=1) / total
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def splitmix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) of uint64 [N], written into `values`."""
    with np.errstate(over="ignore"):
        values += np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            values ^= values >> np.uint64(shift)
            values *= np.uint64(factor)
        values ^= values >> np.uint64(31)
    return values


def spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation of two columns; None when either is constant or shorter than two."""
    if len(a) < 2:
        return None
    x, y = rank_shares(a) - 0.5, rank_shares(b) - 0.5
    size = float(np.sqrt(np.sum(x * x) * np.sum(y * y)))
    return round(float(np.sum(x * y)) / size, 6) if size > 0 else None
