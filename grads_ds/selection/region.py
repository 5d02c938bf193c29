"""Which part of the signal's distribution is wanted: a preference for every sample, higher first.

    density    its density: the chosen are the highest-density region that holds the budget
    magnitude  its combined norm: the top
    mass       density x combined norm: where most of the pool's gradient lies
    band       inside two quantiles of the signal, drawn evenly; outside them by distance, if the
               budget is
               larger
    sample     drawn without replacement with probability in proportion to its density (Efraimidis
               and
               Spirakis 2006)
A larger budget adds samples and drops none, in every region. Equal preferences are ordered by
sample_id.
"""

from __future__ import annotations

import numpy as np

from grads_ds.config.select import SelectConfig
from grads_ds.selection.numbers import random_keys, rounded, uniforms
from grads_ds.statistics import Floats, Ints, rank_shares


def preference(
    settings: SelectConfig,
    sample_id: Ints,
    values: Floats,
    density: Floats,
    magnitude: Floats,
    seed: int,
) -> Floats:
    """The region rule's preference of each sample, float64, finite."""
    if settings.region == "density":
        return density
    if settings.region == "magnitude":
        # by the signal itself where it is the magnitude's own scale: fewer ties after rounding
        return values
    if settings.region == "mass":
        return density * magnitude
    if settings.region == "band":
        return band_preference(values, settings.band, sample_id, seed)
    return weighted_draw(density, sample_id, seed)


def band_preference(
    values: Floats, band: tuple[float, float], sample_id: Ints, seed: int
) -> Floats:
    """Between 0 and 1, at random, inside the band; below 0, by distance in rank, outside."""
    low, high = band_edges(values, band)
    inside = (values >= low) & (values <= high)
    draw = uniforms(random_keys(sample_id, seed, purpose=1))
    if inside.all():
        return draw
    place = rank_shares(values)
    ends = place[inside]
    return np.where(inside, draw, -np.maximum(ends.min() - place, place - ends.max()))


def band_edges(values: Floats, band: tuple[float, float]) -> tuple[float, float]:
    """The band's two quantiles, each an element of `values`."""
    n = len(values)
    low, high = int(np.ceil(band[0] * (n - 1))), int(np.floor(band[1] * (n - 1)))
    high = max(low, high)
    parts = np.partition(values, [low, high])
    return float(parts[low]), float(parts[high])


def weighted_draw(weights: Floats, sample_id: Ints, seed: int) -> Floats:
    """Keys whose k largest are a draw of k without replacement, each step in proportion to
    `weights` (> 0).
    """
    gumbel = -np.log(-np.log(uniforms(random_keys(sample_id, seed, purpose=2))))
    return rounded(np.log(np.maximum(weights, np.finfo(np.float64).tiny)) + gumbel)


def intervals(grid: Floats, inside: np.ndarray) -> list[list[float]]:
    """The stretches of the grid where `inside` is true, as [from, to] pairs."""
    if not len(grid):
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], inside.astype(np.int8), [0]])))
    return [
        [float(grid[a]), float(grid[b - 1])] for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]
