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
    good = np.isfinite(scores)
    shares = np.full(len(scores), np.nan)
    values = scores[good]
    if len(values):
        order = np.argsort(values, kind="stable")
        new = np.concatenate([[True], np.diff(values[order]) > 0])
        starts = np.flatnonzero(new)
        middle = (starts + np.append(starts[1:], len(values))) / (2.0 * len(values))
        placed = np.empty(len(values))
        placed[order] = middle[np.cumsum(new) - 1]
        shares[good] = placed
    return shares


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
