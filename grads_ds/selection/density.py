"""Kernel density of the signal at every sample, in time linear in their number.

The samples are binned linearly on a grid finer than the kernel and smoothed there by KDEpy's FFT
estimator (Gaussian kernel); each sample's density is interpolated from the grid. A boundary at
which norms pile up is mirrored: the mass that the kernel would lose beyond it is folded back.
Bandwidths: Silverman 0.9 min(s, IQR/1.34) n^(-1/5), Scott min(s, IQR/1.35) n^(-1/5), ISJ (Botev,
Grotowski, Kroese 2010) for several modes. Two
columns at once: `joint_density`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from grads_ds.selection.numbers import rounded, rounded_scalar
from grads_ds.statistics import Floats

GRID_STEPS_PER_BANDWIDTH = 16
GRID_LARGEST = 2**18  # beyond it the farthest samples are treated as standing alone
ISJ_SMALLEST = 50  # below it the fixed-point iteration has no support to converge on
REACH = 5.0  # bandwidths beyond the outermost sample that the grid covers
# KDEpy 1.1.12 cuts its kernel where it falls below 1e-4 in absolute terms, so that its result
# depends on the unit of the data; handed over in a unit that makes the bandwidth this, the cut lies
# beyond five bandwidths
KDEPY_WIDTH = 0.01


@dataclass(frozen=True)
class Density:
    """`at_samples` (n), the curve (`grid`, `curve`; empty in 2-D) and how it was made."""

    at_samples: Floats
    grid: Floats
    curve: Floats
    bandwidth: float
    warnings: tuple[str, ...]


def estimate(
    values: Floats, bandwidth: str | float = "silverman", mirror_at: float | None = None
) -> Density:
    """Density of `values` (n >= 1, finite) at each of them, per unit of the values' axis.

    `mirror_at`: a lower end of the axis, at or below the smallest value. All-equal values (one
    sample among them) have no width: each gets density 1 and the bandwidth is 0.
    """
    n = len(values)
    low, high = float(values.min()), float(values.max())
    if n < 2 or low == high:
        return Density(np.ones(n), np.empty(0), np.empty(0), 0.0, ())
    width, notes = choose_bandwidth(values, bandwidth)
    alone = 0.3989422804014327 / (n * width)  # a kernel's own peak: no sample's density is below it
    ends, far = _window(values, low, high, width, mirror_at)
    if far:
        notes.append(f"{far} samples lie so far out that they count as standing alone")
    start = ends[0] if mirror_at is not None else ends[0] - REACH * width
    step = width / GRID_STEPS_PER_BANDWIDTH
    size = int(np.ceil((ends[1] + REACH * width - start) / step)) + 1
    place = (values - start) / step
    inside = (values >= ends[0]) & (values <= ends[1]) if far else None
    counts = _bin(place if inside is None else place[inside], size)
    if mirror_at is None:
        curve = _smooth(counts, step, width) / n
    else:
        both = np.concatenate([counts[:0:-1], counts])
        both[size - 1] *= 2.0  # the boundary's own bin is its own mirror image
        curve = _smooth(both, step, width)[size - 1 :] / n
    peak = float(curve.max())
    unit = float(np.ldexp(1.0, int(np.frexp(peak)[1])))
    curve = rounded(np.maximum(curve, 0.0), unit)
    at = np.maximum(_interpolate(curve, place), alone)
    if inside is not None:
        at[~inside] = alone
    grid = start + step * np.arange(size, dtype=np.float64)
    return Density(rounded(at, unit), grid, curve, width, tuple(notes))


def choose_bandwidth(values: Floats, rule: str | float) -> tuple[float, list[str]]:
    """The kernel's standard deviation by a rule, or the number given; never zero. Notes tell of any
    replacement."""
    if not isinstance(rule, str):
        return float(rule), []
    notes: list[str] = []
    n = len(values)
    if rule == "isj" and n < ISJ_SMALLEST:
        notes.append(
            f"ISJ wants at least {ISJ_SMALLEST} samples, found {n}: Silverman's rule instead"
        )
        rule = "silverman"
    if rule == "isj":
        from KDEpy.bw_selection import improved_sheather_jones

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                width = float(improved_sheather_jones(values[:, None]))
            if np.isfinite(width) and width > 0:
                return rounded_scalar(width), notes
        except (ValueError, RuntimeWarning, AssertionError):
            pass
        notes.append("ISJ found no bandwidth for this distribution: Silverman's rule instead")
    with np.errstate(over="ignore"):
        deviation = float(np.std(values, ddof=1))
    low, high = np.quantile(values, [0.25, 0.75])
    iqr = float(high - low)
    factor, divisor = (1.0, 1.3489795) if rule == "scott" else (0.9, 1.34)
    spread = min(deviation, iqr / divisor) if iqr > 0 else deviation
    return rounded_scalar(factor * spread * float(n) ** -0.2), notes


def _window(
    values: Floats, low: float, high: float, width: float, mirror_at: float | None
) -> tuple[tuple[float, float], int]:
    """The stretch that the grid covers and the number of samples outside it (0 unless outliers
    would blow up the grid).
    """
    low = low if mirror_at is None else mirror_at
    reach = (
        (GRID_LARGEST - 2 * REACH * GRID_STEPS_PER_BANDWIDTH - 4) * width / GRID_STEPS_PER_BANDWIDTH
    )
    if high - low <= reach:
        return (low, high), 0
    middle = float(np.partition(values, len(values) // 2)[len(values) // 2])
    start = low if middle - low < reach / 2 else middle - reach / 2
    ends = (start, start + reach)
    return ends, int(np.count_nonzero((values < ends[0]) | (values > ends[1])))


def _bin(place: Floats, size: int) -> Floats:
    """Linear binning: each sample shared between its two grid points. The shares are exact binary
    fractions."""
    left = place.astype(np.int64)  # place >= 0: the floor
    share = place - left
    share *= 1048576.0
    np.rint(share, out=share)
    share /= 1048576.0
    counts = np.bincount(left, minlength=size)[:size].astype(np.float64)
    counts -= np.bincount(left, weights=share, minlength=size)[:size]
    counts += np.bincount(left + 1, weights=share, minlength=size)[:size]
    return counts


def _smooth(counts: Floats, step: float, width: float) -> Floats:
    from KDEpy import FFTKDE

    # KDEpy wants every point strictly inside the grid: one empty cell at either end
    scale = KDEPY_WIDTH / width
    grid = scale * step * np.arange(-1, len(counts) + 1, dtype=np.float64)
    full = counts > 0
    kde = FFTKDE(kernel="gaussian", bw=KDEPY_WIDTH).fit(grid[1:-1][full], weights=counts[full])
    return np.asarray(kde.evaluate(grid), dtype=np.float64)[1:-1] * (float(counts.sum()) * scale)


def _interpolate(curve: Floats, place: Floats) -> Floats:
    # plain multiplications and additions, each rounded alike everywhere; np.interp may contract
    # them
    place = np.clip(place, 0.0, float(len(curve) - 1))
    left = place.astype(np.int64)  # place >= 0: the floor
    np.minimum(left, len(curve) - 2, out=left)
    share = place - left
    at = np.take(np.diff(curve), left)
    at *= share
    at += np.take(curve, left)
    return at
