"""From the gradient norms of several parameter groups to one signal per sample.

With a_g the norm of group g (float64, >= 0), in this order:
    length correction   log a_g less its least-squares trend in log(target tokens), when asked for
    standardisation     robust: a_g over its median; the signal then has no unit and no group
                        outweighs
                        another by its size
    combination         sum      mean_g a_g                      product  (prod_g a_g)^(1/G)
                        l2       sqrt(mean_g a_g^2)              zscore   mean_g of robust z-scores
                        joint    two-dimensional, see density    <group>  that group's norm alone
    scale               log: the logarithm of it; linear: as it is
Every combination is a mean, so a column given twice changes nothing. The magnitude handed to the
region rules is the combined norm on the linear scale (for zscore and joint the geometric mean),
relative to the median sample's norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.numbers import rounded
from grads_ds.statistics import Floats


@dataclass(frozen=True)
class Signal:
    """`values`: the signal; `magnitude`: combined norm (linear, > 0 unless all norms are zero);
    `parts`: joint's two columns.

    `zero`: where a zero norm lies on the signal's axis, None where it has no place (logarithms,
    z-scores).
    """

    values: Floats
    magnitude: Floats
    parts: tuple[Floats, Floats] | None
    zero: float | None
    notes: dict[str, object]


def build_signal(table: ScoreTable, settings: SelectConfig) -> Signal:
    """The signal of eligible rows. Raises UserError when a group was not recorded."""
    combine = settings.signal
    groups = settings.groups if combine in SelectConfig.COMBINATIONS else [combine]
    notes: dict[str, object] = {"groups": list(groups)}
    norms = [table.norms(group) for group in groups]
    if settings.length_correction:
        lengths = table.floats("num_target_tokens")
        corrected = [without_length(norm, lengths) for norm in norms]
        norms = [norm for norm, _ in corrected]
        notes["length_slope"] = {
            group: slope for group, (_, slope) in zip(groups, corrected, strict=True)
        }
    zeros = np.min(norms, axis=0) == 0
    # rounded last: linear norms rounded first would put everything far below the median in one
    # place
    logs = [np.log(positive(norm)) for norm in norms]
    if settings.standardise == "robust":
        medians = [typical(norm) for norm in norms]
        norms = [norm / median for norm, median in zip(norms, medians, strict=True)]
        logs = [log - np.log(median) for log, median in zip(logs, medians, strict=True)]
        notes["median_norm"] = dict(zip(groups, medians, strict=True))
    logs = [rounded(log) for log in logs]
    mean_log = rounded(_mean(logs))
    geometric = rounded(np.exp(mean_log)) * ~zeros
    if combine in ("zscore", "joint"):
        parts = [robust_z(part) for part in (logs if settings.scale == "log" else norms)]
        two = (parts[0], parts[1]) if combine == "joint" else None
        return Signal(rounded(_mean(parts)), geometric, two, None, notes)
    if combine == "product":
        magnitude = geometric
    elif combine == "l2":
        magnitude = np.sqrt(_mean([norm * norm for norm in norms]))
    else:
        magnitude = _mean(norms)
    values = mean_log if combine == "product" else rounded(np.log(positive(magnitude)))
    magnitude = rounded(magnitude, _unit(magnitude))
    if settings.scale == "linear":
        return Signal(magnitude, magnitude, None, 0.0, notes)
    return Signal(values, magnitude, None, None, notes)


def _mean(parts: list[Floats]) -> Floats:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total / len(parts)


def positive(norm: Floats) -> Floats:
    """Norms whose zeros are replaced by the column's smallest positive value, so that a logarithm
    exists.

    A column of zeros alone becomes ones: all samples equal. Equivariant to scaling.
    """
    found = norm[norm > 0]
    if len(found) == len(norm):
        return norm
    return np.maximum(norm, found.min()) if len(found) else np.ones_like(norm)


def centre(norm: Floats) -> float:
    """The lower median: an element of the column, hence free of rounding."""
    middle = (len(norm) - 1) // 2
    return float(np.partition(norm, middle)[middle])


def typical(norm: Floats) -> float:
    """The lower median; where it is zero, the smallest positive element; 1 when all are zero."""
    middle = centre(norm)
    if middle > 0:
        return middle
    found = norm[norm > 0]
    return float(found.min()) if len(found) else 1.0


def robust_z(values: Floats) -> Floats:
    """(x - median) / (1.4826 MAD); the mean absolute deviation stands in where half the values are
    equal.
    """
    offset = values - centre(values)
    size = 1.4826 * centre(np.abs(offset)) or 1.2533 * float(np.mean(np.abs(offset)))
    return rounded(offset / size) if size > 0 else np.zeros_like(values)


def without_length(norm: Floats, num_target_tokens: Floats) -> tuple[Floats, float]:
    """Norms less their trend in length, and its slope: exp of the residual of log a = alpha + beta
    log(tokens).

    Returns the norms unchanged and slope 0 when all lengths are equal.
    """
    y = np.log(positive(norm))
    x = np.log(np.maximum(num_target_tokens, 1.0))
    x = x - x.mean()
    spread = float(np.sum(x * x))
    if spread <= 1e-12 * len(x):
        return norm, 0.0
    slope = float(np.sum(x * (y - y.mean()))) / spread
    return np.exp(rounded(y - slope * x)), round(slope, 9)


def _unit(values: Floats) -> float:
    """A power of two near the typical size, for rounding relative to it."""
    return float(np.ldexp(1.0, int(np.frexp(typical(values))[1])))
