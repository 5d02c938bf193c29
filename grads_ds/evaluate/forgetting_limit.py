"""A limit to forgetting, and which model keeps it at the largest gain. Pure.

A model may be published when the upper bound of its forgetting lies within the limit. The bound is
for prompts that nobody has looked at. With f the weighted mean over the choice half's n rows and s
its standard error, it is f + q s: q is the quantile, at the level, of (mean of m redrawn rows less
mean of n redrawn rows) / standard error of the latter, all drawn from the choice half, m the rows
of the audit half. So it holds for the mean of that many other prompts, not of an endless number of
them, and dividing by each redraw's own error allows for the skew that divergences have. The level
is 1 - 0.05 / models: the best of many is not let through for being lucky.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_ds.evaluate.candidates import Candidate, Rows
from grads_ds.statistics import Floats, bootstrap_interval

RISK = 0.05  # of breaking the promise, over all models together
TAIL = 10  # redraws beyond the quantile, at least


@dataclass(frozen=True)
class Judged:
    """A candidate with its gain, its forgetting on the choice half, and that one's upper bound."""

    candidate: Candidate
    gain: float
    forgetting: float
    bound: float
    within: bool


@dataclass(frozen=True)
class Audit:
    """The forgetting of a model on the half that took no part in its choice, and its 95 %
    interval.
    """

    forgetting: float
    interval: tuple[float, float]
    rows: int
    within: bool


@dataclass(frozen=True)
class Choice:
    """chosen: the candidate of the largest gain within the limit, None where none is; unlimited:
    that of the largest gain of all; cost: what the limit costs in gain, and its paired 95 %
    interval.
    """

    limit: float
    level: float
    judged: list[Judged]
    chosen: Judged | None
    unlimited: Judged
    cost: tuple[float, tuple[float, float]] | None
    audit: Audit | None


def choose(models: list[Candidate], limit: float, resamples: int, seed: int) -> Choice:
    """The best of `models` under `limit`. A model that has not learned is never the best; of equal
    gains the first wins.
    """
    level = 1 - RISK / len(models)
    judged = []
    for model in models:
        half, other = model.forgetting.half(True), model.forgetting.half(False)
        fresh = len(other.values)
        draws = max(resamples, round(TAIL / (1 - level)))
        bound = upper_bound(half, fresh, level, draws, seed)
        judged.append(Judged(model, model.gain.mean, _mean(half), bound, bound <= limit))
    allowed = [j for j in judged if j.within and j.gain > 0]
    best, unlimited = max(allowed, key=_gain, default=None), max(judged, key=_gain)
    if best is None:
        return Choice(limit, level, judged, None, unlimited, None, None)
    cost = _difference(unlimited.candidate.gain, best.candidate.gain, resamples, seed)
    audit = audited(best.candidate, limit, resamples, seed)
    return Choice(limit, level, judged, best, unlimited, cost, audit)


def audited(model: Candidate, limit: float, resamples: int, seed: int) -> Audit:
    """What the audit half says of a model."""
    half = model.forgetting.half(False)
    interval = bootstrap_interval(half.values, resamples, seed, half.weights)
    return Audit(_mean(half), interval, len(half.values), _mean(half) <= limit)


def upper_bound(rows: Rows, fresh: int, level: float, resamples: int, seed: int) -> float:
    """The bound at the top of this file; infinite for fewer than two rows, or none to come."""
    if len(rows.values) < 2 or not fresh or not rows.weights.sum():
        return float("inf")
    rng = np.random.default_rng([seed, 11])
    fresh_means, _ = _redrawn(rows, fresh, resamples, rng)
    means, errors = _redrawn(rows, len(rows.values), resamples, rng)
    own = float(_error(rows.values[None], rows.weights[None], np.array([rows.mean]))[0])
    gaps = np.divide(fresh_means - means, errors, out=np.full(resamples, np.inf), where=errors > 0)
    if own == 0:  # every row alike: nothing is known of others
        gaps = np.zeros(resamples)
    return rows.mean + float(np.quantile(gaps, level, method="higher")) * own


def _redrawn(
    rows: Rows, count: int, resamples: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Weighted means of `count` redrawn rows and their standard errors, float64 [resamples]."""
    means, errors = np.empty(resamples), np.empty(resamples)
    block = max(1, 2**22 // count)  # redrawn at a time: memory stays bounded
    for first in range(0, resamples, block):
        shape = (min(block, resamples - first), count)
        draws = rng.integers(len(rows.values), size=shape)
        values, weights = rows.values[draws], rows.weights[draws]
        here = slice(first, first + len(draws))
        means[here] = (values * weights).sum(1) / np.maximum(weights.sum(1), 1e-300)
        errors[here] = _error(values, weights, means[here])
    return means, errors


def _error(values_RN: Floats, weights_RN: Floats, means_R: Floats) -> Floats:
    """Standard errors of weighted means, float64 [R]."""
    off = weights_RN * (values_RN - means_R[:, None])
    return np.asarray(np.sqrt((off**2).sum(1)) / np.maximum(weights_RN.sum(1), 1e-300))


def _difference(
    one: Rows, other: Rows, resamples: int, seed: int
) -> tuple[float, tuple[float, float]]:
    values = one.values - other.values
    interval = bootstrap_interval(values, resamples, seed, one.weights)
    return one.mean - other.mean, interval


def _mean(rows: Rows) -> float:
    return rows.mean if len(rows.values) and rows.weights.sum() else float("nan")


def _gain(judged: Judged) -> float:
    return judged.gain
