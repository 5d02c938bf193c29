"""Kernel density of two columns at once, for signal `joint`: whitened, binned on a two-dimensional
grid, smoothed there and interpolated at every sample.
"""

from __future__ import annotations

import numpy as np

from grads_ds.selection.density import KDEPY_WIDTH, REACH, Density, estimate
from grads_ds.selection.numbers import rounded, rounded_scalar
from grads_ds.statistics import Floats

JOINT_GRID = 1024  # points per axis at most
# robust z-scores beyond this are drawn in to it before the two-dimensional estimate
JOINT_REACH = 12.0


def estimate_joint(x: Floats, y: Floats, bandwidth: str | float = "silverman") -> Density:
    """Two-dimensional density of (x, y) at each sample; one-dimensional when y says nothing beyond
    x.

    The columns are standardised and decorrelated first; a rule's width is n^(-1/6) (Silverman's and
    Scott's rules agree in two dimensions; ISJ has no such form and stands for the same), a number
    is taken in those units.
    """
    n = len(x)
    u, v, notes = _whitened(x, y)
    if v is None:
        return estimate(u, bandwidth)
    width = rounded_scalar(bandwidth if isinstance(bandwidth, float) else float(n) ** (-1.0 / 6.0))
    if bandwidth == "isj":
        notes.append("ISJ exists in one dimension only: the joint density uses n^(-1/6)")
    # one step for both axes keeps the kernel round
    u, v = np.clip(u, -JOINT_REACH, JOINT_REACH), np.clip(v, -JOINT_REACH, JOINT_REACH)
    lows = (float(u.min()) - REACH * width, float(v.min()) - REACH * width)
    spans = (float(u.max()) - float(u.min()), float(v.max()) - float(v.min()))
    extent = max(spans) + 2 * REACH * width
    size = min(JOINT_GRID, int(np.ceil(8 * extent / width)) + 2)
    step = extent / (size - 2)
    if step > width / 2:
        width, notes = (
            2 * step,
            [*notes, f"joint bandwidth raised to {2 * step:.4g}, the finest its grid resolves"],
        )
    a, b = (u - lows[0]) / step, (v - lows[1]) / step
    counts = _bin_2d(a, b, size)
    surface = _smooth_2d(counts, step, width) / n
    unit = float(np.ldexp(1.0, int(np.frexp(float(surface.max()))[1])))
    surface = rounded(np.maximum(surface, 0.0), unit)
    at = np.maximum(_interpolate_2d(surface, a, b), 0.15915494309189535 / (n * width * width))
    return Density(rounded(at, unit), np.empty(0), np.empty(0), width, tuple(notes))


def _bin_2d(a: Floats, b: Floats, size: int) -> Floats:
    i, j = np.floor(a).astype(np.int64), np.floor(b).astype(np.int64)
    s, t = np.rint((a - i) * 1024.0) / 1024.0, np.rint((b - j) * 1024.0) / 1024.0
    total = np.zeros(size * size)
    for di, dj, share in (
        (0, 0, (1 - s) * (1 - t)),
        (1, 0, s * (1 - t)),
        (0, 1, (1 - s) * t),
        (1, 1, s * t),
    ):
        total += np.bincount((i + di) * size + j + dj, weights=share, minlength=size * size)
    return total.reshape(size, size)


def _smooth_2d(counts: Floats, step: float, width: float) -> Floats:
    from KDEpy import FFTKDE

    size = len(counts)
    scale = KDEPY_WIDTH / width
    axis = scale * step * np.arange(-1, size + 1, dtype=np.float64)
    i, j = np.nonzero(counts)
    points = np.column_stack([axis[1:-1][i], axis[1:-1][j]])
    grid = np.column_stack([np.repeat(axis, size + 2), np.tile(axis, size + 2)])
    kde = FFTKDE(kernel="gaussian", bw=KDEPY_WIDTH).fit(points, weights=counts[i, j])
    smooth = np.asarray(kde.evaluate(grid), dtype=np.float64).reshape(size + 2, size + 2)
    return smooth[1:-1, 1:-1] * (float(counts.sum()) * scale * scale)


def _interpolate_2d(surface: Floats, a: Floats, b: Floats) -> Floats:
    i, j = np.floor(a).astype(np.int64), np.floor(b).astype(np.int64)
    s, t = a - i, b - j
    return (surface[i, j] * (1 - s) + surface[i + 1, j] * s) * (1 - t) + (
        surface[i, j + 1] * (1 - s) + surface[i + 1, j + 1] * s
    ) * t


def _whitened(x: Floats, y: Floats) -> tuple[Floats, Floats | None, list[str]]:
    """Two columns of robust z-scores, decorrelated; None for the second when it is a function of
    the first.
    """
    if not np.any(y != y[0]):
        return x, None, ["the second group's norms are all equal: density of the first alone"]
    if not np.any(x != x[0]):
        return y, None, ["the first group's norms are all equal: density of the second alone"]
    a, b = np.clip(x, -JOINT_REACH, JOINT_REACH), np.clip(y, -JOINT_REACH, JOINT_REACH)
    a, b = a - a.mean(), b - b.mean()
    sa, sb = float(np.sqrt(np.mean(a * a))), float(np.sqrt(np.mean(b * b)))
    rho = float(np.mean(a * b)) / (sa * sb)
    left = 1.0 - rho * rho
    if left < 1e-9:
        return x, None, ["the two groups' norms rise and fall as one: density of the first alone"]
    rho, root = rounded_scalar(abs(rho)) * np.sign(rho), rounded_scalar(float(np.sqrt(left)))
    u, v = x / rounded_scalar(sa), y / rounded_scalar(sb)
    return rounded(u), rounded((v - rho * u) / root), []
