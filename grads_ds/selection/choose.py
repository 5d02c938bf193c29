"""One choice: score table and settings in, chosen samples and the reason for each out. Pure; no
files.

All rows of the table are kept, in the order of sample_id; rows that cannot be chosen carry a reason
instead of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection import budget as budgets
from grads_ds.selection import control_areas
from grads_ds.selection.duplicates import likeliest_of_each
from grads_ds.selection.explain import length_warning, numbers_of, reasons_of
from grads_ds.selection.filters import Rejection, rejections
from grads_ds.selection.methods import score
from grads_ds.statistics import Floats, Ints

# (row) -> None when the row is unlike every row accepted so far (and is now one of them), else the
# one it is like
SeenBefore = Callable[[int], int | None]


@dataclass(frozen=True)
class Choice:
    """Arrays of the table's length, NaN or 0 where a row has none, and the choice itself.

    `rank`: 1 is best. `reason`: indices into `reasons`. `weight`: mean 1 over the chosen, 0
    elsewhere. `chosen`: rows of the table in order of preference. `report`: what stands in
    selection.json.
    """

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
    """Choose from `table`. `strata`: a small non-negative code per row; `seen_before`: see
    `duplicates`.

    Raises UserError when no row can be chosen, a column is missing, or the budget does not fit the
    pool.
    """
    n = len(table)
    good = table.eligible()
    statuses = table.count_by_status()
    if not good.any():
        raise UserError(
            f"select: wanted at least one sample of status ok with finite scores; found {statuses};"
            " look into the probe's log"
        )
    rows = np.flatnonzero(good)
    part = table.rows(good) if len(rows) < n else table
    scored = score(part, settings, seed)
    strata = None if scored.across_strata else strata
    rejected = rejections(part, settings)
    kept = np.ones(len(part), dtype=bool)
    for rejection in rejected:
        kept &= ~rejection.rows
    scorable = np.flatnonzero(np.isfinite(scored.preference) & kept)
    if not len(scorable):
        filtered = f", {np.count_nonzero(~kept)} rejected by filters" if rejected else ""
        raise UserError(
            f"select.method: {settings.method} has a finite score for none of {len(part)}"
            f" samples{filtered}; choose another method or filter, or look into its columns"
        )
    warnings = [*scored.warnings]
    if len(rows) < n:
        out = {word: count for word, count in statuses.items() if word != "ok"}
        if unfinished := statuses["ok"] - len(rows):
            out["ok but with scores that are not finite"] = unfinished
        listed = ", ".join(f"{count} {word}" for word, count in out.items())
        warnings.append(f"{n - len(rows)} of {n} samples can never be chosen: {listed}")

    # how many, and in which order
    gain = None if scored.gain is None else scored.gain[scorable]
    budget = budgets.resolve_budget(settings, n, len(scorable), gain)
    warnings += budget.warnings
    # rows stand in the order of sample_id, so that a stable sort leaves ties in that order
    order = scorable[np.argsort(-scored.preference[scorable], kind="stable")]
    order = rows[order] if len(rows) < n else order
    if len(order) > 1 and scored.preference[scorable].min() == scored.preference[scorable].max():
        warnings.append("every sample has the same preference: the lowest sample_ids are chosen")
    if strata is not None:
        behind = np.zeros(n, dtype=bool)
        behind[rows] = False if scored.behind is None else scored.behind
        order = np.concatenate(
            [
                budgets.spread(part_of, strata, settings.strata_balance)
                for part_of in (order[~behind[order]], order[behind[order]])
            ]
        )
    tokens = None
    if "num_tokens" in table.columns or budget.tokens is not None:
        tokens = table.floats("num_tokens").astype(np.int64)
    if seen_before is not None and (stays := settings.duplicate_kept()) != "first":
        # where nearness alone orders the pool, the nearest have few others like them to wait for
        last = stays == "likeliest_last" and not scored.across_strata
        order, twins = likeliest_of_each(order, table.floats("loss"), seen_before, last)
        chosen = order[: budgets.front(order, budget, tokens)]
    else:
        chosen, twins = _take(order, budget, tokens, seen_before)
    if seen_before is not None and budget.tokens is None and len(chosen) < budget.samples:
        warnings.append(
            f"{len(chosen)} of {budget.samples} samples: all others are near-duplicates of these"
        )

    signal, density, preference = np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
    signal[rows], preference[rows] = scored.signal, scored.preference
    if scored.density is not None:
        density[rows] = scored.density.at_samples
    rank = np.zeros(n, dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    selected = np.zeros(n, dtype=bool)
    selected[chosen] = True
    reason, reasons = reasons_of(
        table,
        settings,
        good,
        preference,
        signal,
        selected,
        twins,
        _at_rows(rejected, rows, n),
        stratified=strata is not None,
    )
    numbers = numbers_of(
        table, part, good, scored, settings, preference, signal, chosen, seed, strata is not None
    )
    warnings += length_warning(settings, numbers["length"])
    report: dict[str, Any] = {
        "method": settings.method,
        "counts": {
            "pool": n,
            "ok": len(rows),
            "judged": len(scorable),
            "rejected_by_filters": int(np.count_nonzero(~kept)),
            "selected": len(chosen),
            "near_duplicates_dropped": len(twins),
            "by_status": statuses,
        },
        "budget": budgets.describe(budget, chosen, tokens, n),
        **numbers,
        "signals": control_areas.report(part),
        "filters": [rejection.numbers for rejection in rejected],
        "notes": scored.notes,
    }
    weight = weigh(settings, selected, density, rank)
    return Choice(
        table.sample_id,
        signal,
        density,
        selected,
        rank,
        reason,
        reasons,
        weight,
        chosen,
        report,
        warnings,
    )


def _at_rows(rejected: list[Rejection], rows: Ints, count: int) -> list[tuple[Ints, str]]:
    """Rows of the whole table that each filter rejects, and why; of several the first is named."""
    found, seen = [], np.zeros(count, dtype=bool)
    for rejection in rejected:
        here = rows[rejection.rows]
        found.append((here[~seen[here]], rejection.reason))
        seen[here] = True
    return found


def _take(
    order: Ints, budget: budgets.Budget, tokens: Ints | None, seen_before: SeenBefore | None
) -> tuple[Ints, dict[int, int]]:
    """The front of the order within the budget, and {dropped row: accepted row it is like}."""
    if seen_before is None:
        return order[: budgets.front(order, budget, tokens)], {}
    kept: list[int] = []
    twins: dict[int, int] = {}
    spent = 0
    for row in order.tolist():
        if len(kept) == budget.samples:
            break
        if budget.tokens is not None and tokens is not None:
            if spent + int(tokens[row]) > budget.tokens:
                break
            spent += int(tokens[row])
        like = seen_before(row)
        if like is None:
            kept.append(row)
        else:
            twins[row] = like
            spent -= int(tokens[row]) if budget.tokens is not None and tokens is not None else 0
    if not kept:
        budgets.front(order, budget, tokens)  # says what is wrong
    return np.array(kept, dtype=np.int64), twins


def weigh(
    settings: SelectConfig, selected: NDArray[np.bool_], density: Floats, rank: Ints
) -> Floats:
    """Training weights of mean 1 over the chosen. Raises UserError when they want a density and
    none exists.

    inverse_density: 1 / density, which evens out the distribution of the signal; preference:
    falling from the first place to the last.
    """
    weight = selected.astype(np.float64)
    if settings.weights == "inverse_density":
        if not np.isfinite(density[selected]).all():
            raise UserError(
                "select.weights: inverse_density wants a method with a density; found"
                f" {settings.method}; use grads or weights: none"
            )
        weight[selected] = 1.0 / density[selected]
    elif settings.weights == "preference" and selected.any():
        weight[selected] = 1.0 - (rank[selected] - 1.0) / float(rank[selected].max())
    total = float(weight.sum())
    return weight * (np.count_nonzero(selected) / total) if total > 0 else weight
