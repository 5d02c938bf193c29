"""Statistics that several stages share: shares of ranks, rank correlation. No torch import."""

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


def spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation of two columns; None when either is constant or shorter than two."""
    if len(a) < 2:
        return None
    x, y = rank_shares(a) - 0.5, rank_shares(b) - 0.5
    size = float(np.sqrt(np.sum(x * x) * np.sum(y * y)))
    return round(float(np.sum(x * y)) / size, 6) if size > 0 else None
