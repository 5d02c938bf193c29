"""Covering a feature space with few samples: k-centre, exactly on small pools and by nested grids
on large ones.

Up to `EXACT_LARGEST` samples: farthest-first traversal (Gonzalez 1985), within twice the best
radius at every k. Above it: grids of halving cell size; each level chooses one sample of every
occupied cell not yet represented, so that the order covers coarsely first, then finer, in time
linear in the number of samples. Both orders are nested in k.
"""

from __future__ import annotations

import numpy as np

from grads_ds.selection.numbers import random_keys, uniforms
from grads_ds.statistics import Floats, Ints

EXACT_LARGEST = 5000
LEVELS = 10


def cover_preference(features: Floats, sample_id: Ints, seed: int) -> Floats:
    """A preference (higher first) whose k best samples cover `features` (n x d); ties in a cell go
    by seeded key.
    """
    draw = uniforms(random_keys(sample_id, seed, purpose=4))
    if len(features) <= EXACT_LARGEST:
        return farthest_first(features)
    return grid_cover(features, draw)


def farthest_first(features: Floats) -> Floats:
    """Minus the step at which each sample is taken; the first is the one nearest the middle, ties
    by position.
    """
    n = len(features)
    centre = np.median(features, axis=0)
    distance = np.full(n, np.inf)
    preference = np.zeros(n)
    taken = int(np.argmin(_squares(features, centre)))
    for step in range(n):
        preference[taken] = -float(step)
        distance = np.minimum(distance, _squares(features, features[taken]))
        distance[taken] = -1.0
        taken = int(np.argmax(distance))
    return preference


def grid_cover(features: Floats, draw: Floats) -> Floats:
    """Minus (level at which a sample represents its cell) plus a draw in (0, 1) that orders a
    level's samples.
    """
    n = len(features)
    low = features.min(axis=0)
    size = float(np.max(features.max(axis=0) - low)) or 1.0
    level_of = np.full(n, LEVELS, dtype=np.int64)
    # the sample of a cell with the highest draw represents it; it does so in its finer cell as well
    order = np.argsort(-draw, kind="stable")
    for level in range(LEVELS):
        cells = np.floor((features - low) * (2.0**level / size * (1 - 1e-12))).astype(np.uint64)
        code = np.zeros(n, dtype=np.uint64)
        with np.errstate(over="ignore"):
            for column in cells.T:
                code = (code ^ column) * np.uint64(0x9E3779B97F4A7C15)
                code ^= code >> np.uint64(29)
        _, first = np.unique(code[order], return_index=True)
        represents = order[first]
        level_of[represents] = np.minimum(level_of[represents], level)
    return draw - level_of


def _squares(features: Floats, point: Floats) -> Floats:
    total = np.zeros(len(features))
    for j in range(features.shape[1]):  # column by column: one order of additions everywhere
        total += (features[:, j] - point[j]) ** 2
    return total
