"""One choice: score table and settings in, chosen samples and the reason for each out. Pure; reads and writes nothing.

All rows of the table are kept, in the order of sample_id; rows that cannot be chosen carry a reason instead of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config import SelectConfig, UserError
from grads_ds.selection import budget as budgets
from grads_ds.selection.density import estimate
from grads_ds.selection.methods import Scored, score
from grads_ds.selection.numbers import Floats, Ints, random_keys, spearman
from grads_ds.selection.region import intervals
from grads_ds.selection.table import ScoreTable

CURVE_POINTS = 256

# (row) -> None when the row is unlike all rows accepted so far (it is then one of them), else the row it is like
SeenBefore = Callable[[int], int | None]


@dataclass(frozen=True)
class Choice:
    """Arrays of the table's length: `signal`, `density` (NaN where there is none), `selected`, `rank` (1 is best, 0: none),
    `reason` (indices into `reasons`), `weight`; `chosen`: rows in order of preference; `report`: numbers for selection.json."""

    sample_id: Ints
    signal: Floats
    density: Floats
    selected: NDArray[np.bool_]
    rank: Ints
    reason: Ints
    reasons: list[str]
    weight: Floats
    chosen: Ints
    report: dict[str, Any]
    warnings: list[str]


def choose(
    table: ScoreTable,
    settings: SelectConfig,
    seed: int,
    strata: NDArray[np.int64] | None = None,
    seen_before: SeenBefore | None = None,
) -> Choice:
    """Choose from `table`. `strata`: a small non-negative code per row; `seen_before`: see near-duplicates.

    Raises UserError when no row can be chosen, a needed column is missing, or the budget does not fit the pool.
    """
    n = len(table)
    good = table.eligible()
    statuses = {
        str(word): int(np.count_nonzero(table.status == word)) for word in sorted(set(table.status.tolist()))
    }
    if not good.any():
        raise UserError(
            f"select: wanted at least one sample of status ok with finite scores; found {statuses}; check the probe"
        )
    rows = np.flatnonzero(good)
    part = table.rows(good) if len(rows) < n else table
    scored = score(part, settings, seed)
    judged = np.isfinite(scored.preference)
    if not judged.any():
        raise UserError(
            f"select.method: {settings.method} could judge none of {len(part)} samples; choose another method or check its columns"
        )
    heard = list(scored.warnings)

    gain = scored.gain if scored.gain is None else scored.gain[judged]
    budget = budgets.resolve_budget(settings, n, int(np.count_nonzero(judged)), gain)
    heard += budget.warnings
    within = np.flatnonzero(judged)
    # rows stand in the order of sample_id, so that a stable sort leaves ties in that order
    order = rows[within[np.argsort(-scored.preference[within], kind="stable")]]
    if strata is not None:
        order = budgets.spread(order, strata, settings.strata_balance)
    tokens = (
        np.asarray(table.columns["num_tokens"], dtype=np.int64) if "num_tokens" in table.columns else None
    )
    if budget.tokens is not None and tokens is None:
        table.floats("num_tokens")
    twins: dict[int, int] = {}
    if seen_before is None:
        count = budgets.front(order, budget, tokens)
        chosen = order[:count]
    else:
        chosen, twins = without_twins(order, budget, tokens, seen_before)
        count = len(chosen) + len(twins)
        if len(chosen) < budget.samples and budget.tokens is None:
            heard.append(
                f"{len(chosen)} of {budget.samples} samples: the rest of the pool are near-duplicates"
            )

    signal, density, rank = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=np.int64)
    signal[rows] = scored.signal
    if scored.density is not None:
        density[rows] = scored.density.at_samples
    rank[order] = np.arange(1, len(order) + 1)
    selected = np.zeros(n, dtype=bool)
    selected[chosen] = True
    wanted = np.full(n, np.nan)
    wanted[rows] = scored.preference
    reason, reasons = explain(table, settings, good, wanted, signal, selected, twins, strata is not None)
    weight = weigh(settings, selected, density, rank)
    total_tokens = int(tokens[chosen].sum()) if tokens is not None else None
    report: dict[str, Any] = {
        "method": settings.method,
        "counts": {
            "pool": n, "ok": len(rows), "judged": int(np.count_nonzero(judged)), "selected": len(chosen),
            "near_duplicates_dropped": len(twins), "by_status": statuses,
            "not_finite": int(statuses.get("ok", 0)) - len(rows),
        },
        "budget": budgets.describe(budget, len(chosen), total_tokens, n),
        "thresholds": thresholds(wanted, signal, chosen),
        **distribution(part, scored, signal, selected, len(chosen), settings, strata is not None),
        "versus_random": versus_random(table, good, selected, chosen, seed),
        "length": length_diagnostic(part, scored.signal, table, selected),
        "notes": scored.notes,
    }  # fmt: skip
    if len(set(statuses) - {"ok"}):
        left = sum(count for word, count in statuses.items() if word != "ok")
        heard.append(
            f"{left} samples can never be chosen: "
            + ", ".join(f"{c} {w}" for w, c in statuses.items() if w != "ok")
        )
    if len(rows) > 1 and not np.any(scored.preference[judged] != scored.preference[judged][0]):
        heard.append("every sample has the same preference: the lowest sample_ids are chosen")
    return Choice(
        table.sample_id, signal, density, selected, rank, reason, reasons, weight, chosen, report, heard
    )


def without_twins(
    order: Ints, budget: budgets.Budget, tokens: Ints | None, seen_before: SeenBefore
) -> tuple[Ints, dict[int, int]]:
    """Walk the order, dropping rows like one accepted before, until the budget is full: (accepted, {dropped: like})."""
    kept: list[int] = []
    twins: dict[int, int] = {}
    spent = 0
    for row in order.tolist():
        if len(kept) == budget.samples:
            break
        cost = int(tokens[row]) if tokens is not None else 0
        if budget.tokens is not None and spent + cost > budget.tokens:
            break
        like = seen_before(row)
        if like is None:
            kept.append(row)
            spent += cost
        else:
            twins[row] = like
    return np.array(kept, dtype=np.int64), twins


def explain(
    table: ScoreTable,
    settings: SelectConfig,
    good: NDArray[np.bool_],
    wanted: Floats,
    signal: Floats,
    selected: NDArray[np.bool_],
    twins: dict[int, int],
    stratified: bool,
) -> tuple[Ints, list[str]]:
    """Why each row is in or out: codes into a list of sentences."""
    what = settings.region if settings.method == "grads" else settings.method
    worst = float(np.min(wanted[selected])) if selected.any() else float("nan")
    edge = f"{what} preference {worst:.6g}"
    rule = "its stratum's share" if stratified else edge
    middle = float(np.median(signal[good]))
    reasons = [
        f"in: within {rule}" if stratified else f"in: at or above {edge}",
        f"out: beyond {rule}, signal at or below the median"
        if stratified
        else f"out: below {edge}, signal at or below the median",
        f"out: beyond {rule}, signal above the median"
        if stratified
        else f"out: below {edge}, signal above the median",
        f"out: equal to {edge}, but a higher sample_id or beyond the budget",
        f"out: {settings.method} has no finite preference for it",
        "out: scores are not finite",
    ]
    code = np.where(signal > middle, 2, 1).astype(np.int64)
    if not stratified:
        code[wanted >= worst] = 3
    code[good & ~np.isfinite(wanted)] = 4
    code[~good] = 5
    for word in sorted(set(table.status[~good].tolist()) - {"ok"}):
        reasons.append(f"out: status {word}")
        code[table.status == word] = len(reasons) - 1
    code[selected] = 0
    for row, like in twins.items():
        reasons.append(f"out: near-duplicate of sample {table.sample_id[like]}")
        code[row] = len(reasons) - 1
    return code, reasons


def weigh(settings: SelectConfig, selected: NDArray[np.bool_], density: Floats, rank: Ints) -> Floats:
    """Training weights of mean 1 over the chosen (0 elsewhere). Raises UserError when the method has no density."""
    weight = selected.astype(np.float64)
    if settings.weights == "inverse_density":
        if not np.isfinite(density[selected]).all():
            raise UserError(
                f"select.weights: inverse_density wants a method with a density; found {settings.method}; use grads or weights: none"
            )
        weight[selected] = 1.0 / density[selected]
    elif settings.weights == "preference":
        last = float(rank[selected].max()) if selected.any() else 1.0
        weight[selected] = 1.0 - (rank[selected] - 1.0) / last
    total = float(weight.sum())
    return weight * (np.count_nonzero(selected) / total) if total > 0 else weight


def thresholds(wanted: Floats, signal: Floats, chosen: Ints) -> dict[str, Any]:
    """The least preference among the chosen and the stretch of the signal that they cover."""
    if not len(chosen):
        return {"preference": None, "signal_min": None, "signal_max": None}
    inside = signal[chosen]
    return {
        "preference": _json(np.min(wanted[chosen])),
        "signal_min": _json(np.min(inside)),
        "signal_max": _json(np.max(inside)),
    }


def distribution(
    part: ScoreTable,
    scored: Scored,
    signal: Floats,
    selected: NDArray[np.bool_],
    count: int,
    settings: SelectConfig,
    stratified: bool,
) -> dict[str, Any]:
    """Bandwidth, quantiles, the density's curve over pool and chosen, and the region as stretches of the signal."""
    values = scored.signal[np.isfinite(scored.signal)]
    marks = [0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0]
    found: dict[str, Any] = {
        "bandwidth": None,
        "signal_quantiles": {
            f"{m:g}": _json(q) for m, q in zip(marks, np.quantile(values, marks), strict=True)
        }
        if len(values)
        else {},
        "curve": None,
        "region": None,
    }
    density = scored.density
    if density is None:
        return found
    found["bandwidth"] = _json(density.bandwidth)
    if len(density.grid):
        # evenly over the central stretch: outliers would leave the picture to two points
        low, high = np.quantile(values, [0.001, 0.999])
        reach = 3 * density.bandwidth
        x = np.linspace(max(low - reach, density.grid[0]), min(high + reach, density.grid[-1]), CURVE_POINTS)
        mine = signal[selected]
        curve: dict[str, Any] = {
            "signal": _list(x),
            "pool": _list(np.interp(x, density.grid, density.curve)),
            "selected": None,
        }
        if count > 1 and np.any(mine != mine[0]):
            own = estimate(mine)
            curve["selected"] = _list(np.interp(x, own.grid, own.curve, left=0.0, right=0.0))
        found["curve"] = curve
    if (
        settings.method == "grads"
        and settings.forget_less == 0
        and not stratified
        and settings.region in ("density", "mass")
    ):
        found["region"] = _stretches(scored, selected, signal, settings)
    return found


def _stretches(
    scored: Scored, selected: NDArray[np.bool_], signal: Floats, settings: SelectConfig
) -> list[list[float]] | None:
    density = scored.density
    if density is None or not len(density.grid) or not selected.any():
        return None
    worst = float(np.min(scored.preference[np.isin(scored.signal, signal[selected])]))
    gain = density.curve
    if settings.region == "mass":
        if settings.signal not in ("product",) and settings.scale == "log" and settings.signal == "zscore":
            return None
        gain = gain * (np.exp(density.grid) if settings.scale == "log" else density.grid)
    return intervals(density.grid, gain >= worst)


def versus_random(
    table: ScoreTable, good: NDArray[np.bool_], selected: NDArray[np.bool_], chosen: Ints, seed: int
) -> dict[str, Any]:
    """Overlap with the random subset of the same size and seed."""
    rows = np.flatnonzero(good)
    k = len(chosen)
    draw = random_keys(table.sample_id[rows], seed)
    drawn = rows[np.argsort(draw, kind="stable")[::-1][:k]]
    both = int(np.count_nonzero(selected[drawn]))
    union = 2 * k - both
    return {
        "samples": k, "overlap": both, "expected_by_chance": round(k * k / len(rows), 3),
        "jaccard": round(both / union, 6) if union else None,
    }  # fmt: skip


def length_diagnostic(
    part: ScoreTable, signal: Floats, table: ScoreTable, selected: NDArray[np.bool_]
) -> dict[str, Any] | None:
    """Does the signal only measure length? Its rank correlation with target tokens, and mean lengths of pool and chosen."""
    if "num_target_tokens" not in part.columns:
        return None
    lengths = part.floats("num_target_tokens")
    return {
        "spearman_signal_length": spearman(signal, lengths),
        "mean_target_tokens_pool": round(float(lengths.mean()), 3),
        "mean_target_tokens_selected": round(float(table.floats("num_target_tokens")[selected].mean()), 3)
        if selected.any() else None,
    }  # fmt: skip


def _json(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _list(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
