"""Why each sample is in or out, and the numbers behind a choice: what selection.json and the report
show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.criterion import Scored
from grads_ds.selection.density import Density, estimate
from grads_ds.selection.numbers import random_keys
from grads_ds.selection.region import intervals
from grads_ds.statistics import Floats, Ints, spearman

CURVE_POINTS = 256
DIAGNOSED = 200_000  # samples behind a rank correlation; more add digits, not insight
LENGTH_LIKE = 0.8  # rank correlation from which a signal says little that length does not
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def reasons_of(
    table: ScoreTable,
    settings: SelectConfig,
    good: NDArray[np.bool_],
    preference: Floats,
    signal: Floats,
    selected: NDArray[np.bool_],
    twins: dict[int, int],
    rejected: list[tuple[Ints, str]],
    stratified: bool,
) -> tuple[Ints, list[str]]:
    """Per row an index into a list of sentences; a handful of sentences for any number of rows.

    Args:
        table: all rows [N].
        settings: of the choice.
        good: which rows are eligible, bool [N].
        preference, signal: preference and signal, float64 [N].
        selected: the chosen rows, bool [N].
        twins: dropped row -> accepted row that it is like.
        rejected: per filter the rows that it rejects and its sentence.
        stratified: whether strata share the budget.
    """
    what = settings.region if settings.method == "grads" else settings.method
    worst = float(np.min(preference[selected])) if selected.any() else float("nan")
    edge = "its stratum's share" if stratified else f"{what} preference {worst:.6g}"
    beyond = f"out: beyond {edge}" if stratified else f"out: below {edge}"
    reasons = [
        f"in: within {edge}" if stratified else f"in: at or above {edge}",
        f"{beyond}, signal at or below the median",
        f"{beyond}, signal above the median",
        f"out: {what} preference as high as the last one chosen, but further back in the order",
        f"out: {settings.method} has no finite preference for it",
        "out: scores are not finite",
    ]
    code = np.where(signal > np.median(signal[good]), 2, 1).astype(np.int64)
    if not stratified:
        code[preference >= worst] = 3
    code[good & ~np.isfinite(preference)] = 4
    code[~good] = 5
    for rows, sentence in rejected:
        reasons.append(sentence)
        code[rows] = len(reasons) - 1
    for index, word in enumerate(table.status_words):
        if word != "ok":
            reasons.append(f"out: status {word}")
            code[table.status == index] = len(reasons) - 1
    code[selected] = 0
    for row, like in twins.items():
        reasons.append(f"out: near-duplicate of sample {table.sample_id[like]}")
        code[row] = len(reasons) - 1
    return code, reasons


def numbers_of(
    table: ScoreTable,
    part: ScoreTable,
    good: NDArray[np.bool_],
    scored: Scored,
    settings: SelectConfig,
    preference: Floats,
    signal: Floats,
    chosen: Ints,
    seed: int,
    stratified: bool,
) -> dict[str, Any]:
    """Thresholds, bandwidth, quantiles, curve, region, overlap with random and the length
    diagnostic.
    """
    worst = float(np.min(preference[chosen]))
    found = {
        "thresholds": {
            "preference": _json(worst),
            "signal_min": _json(np.min(signal[chosen])),
            "signal_max": _json(np.max(signal[chosen])),
        },
        "bandwidth": None if scored.density is None else _json(scored.density.bandwidth),
        "signal_quantiles": quantiles(scored.signal),
        "curve": (
            None if scored.density is None else curve(scored.density, signal[chosen], scored.signal)
        ),
        "region": None if stratified else region(scored, settings, worst),
        "versus_random": versus_random(table.sample_id, good, chosen, seed),
        "length": None,
    }
    if "num_target_tokens" in table.columns:
        lengths = table.floats("num_target_tokens")
        found["length"] = length_diagnostic(
            part.floats("num_target_tokens"), scored.signal, lengths[chosen]
        )
    return found


def quantiles(values: Floats) -> dict[str, float | None]:
    """Quantiles of the finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    return {
        f"{mark:g}": _json(value)
        for mark, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    }


def curve(density: Density, inside: Floats, values: Floats) -> dict[str, list[float] | None] | None:
    """The density of the pool, and of the chosen, along the signal's central 99.8 %; None without a
    grid.
    """
    if not len(density.grid):
        return None
    # outliers would leave the picture to two points
    low, high = np.quantile(values, [0.001, 0.999])
    reach = 3 * density.bandwidth
    x = np.linspace(
        max(low - reach, density.grid[0]), min(high + reach, density.grid[-1]), CURVE_POINTS
    )
    pool = np.interp(x, density.grid, density.curve)
    local = estimate(inside)
    own = (
        _list(np.interp(x, local.grid, local.curve, left=0.0, right=0.0))
        if len(local.grid)
        else None
    )
    return {"signal": _list(x), "pool": _list(pool), "selected": own}


def region(scored: Scored, settings: SelectConfig, worst: float) -> list[list[float]] | None:
    """The stretches of the signal whose preference is at least the least chosen one's; None where
    the rule is not one of the signal alone.
    """
    density = scored.density
    if (
        settings.method != "grads"
        or settings.forget_less > 0
        or density is None
        or not len(density.grid)
    ):
        return None
    if settings.region == "density":
        return intervals(density.grid, density.curve >= worst)
    if settings.region == "mass" and settings.signal not in ("zscore", "joint"):
        norm = np.exp(density.grid) if settings.scale == "log" else density.grid
        return intervals(density.grid, density.curve * norm >= worst)
    return None


def versus_random(
    sample_id: Ints, good: NDArray[np.bool_], chosen: Ints, seed: int
) -> dict[str, Any]:
    """Overlap with the subset of the same size that method random chooses with the same seed."""
    rows = np.flatnonzero(good)
    k = len(chosen)
    draw = random_keys(sample_id[rows], seed)
    drawn = np.zeros(len(sample_id), dtype=bool)
    drawn[rows[np.argpartition(draw, len(rows) - k)[len(rows) - k :]]] = True
    both = int(np.count_nonzero(drawn[chosen]))
    return {
        "samples": k,
        "overlap": both,
        "expected_by_chance": round(k * k / len(rows), 3),
        "jaccard": round(both / (2 * k - both), 6),
    }


def length_diagnostic(lengths: Floats, signal: Floats, chosen: Floats) -> dict[str, Any]:
    """Does the signal only measure length? Its rank correlation with target tokens, and mean
    lengths.
    """
    step = -(-len(lengths) // DIAGNOSED)
    return {
        "spearman_signal_length": spearman(signal[::step], lengths[::step]),
        "mean_target_tokens_pool": round(float(lengths.mean()), 3),
        "mean_target_tokens_selected": round(float(chosen.mean()), 3),
    }


def length_warning(settings: SelectConfig, length: dict[str, Any] | None) -> list[str]:
    """What to say when GrADS's signal orders the samples almost as their lengths do."""
    found = length["spearman_signal_length"] if length else None
    if settings.method != "grads" or found is None or abs(found) < LENGTH_LIKE:
        return []
    advice = "" if settings.length_correction else "; length_correction: true takes the trend out"
    return [f"the signal is mostly length: rank correlation {found:.2f} with target tokens{advice}"]


def _json(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _list(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
