"""Which columns see what is wrong, on this pool with this model: the probe's controls against the
pool, column by column.

The area under the curve (AUC) is the chance that a control has the higher value than a row of the
pool: 0.5 is blind, 1 or 0 sees all. Controls are wrong, but for the kind `reference`, which is
right: rows of the reference set. The pool holds what is wrong with it, so a clean pool's area
would lie a little further out. Pure functions of the score table; no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from grads_ds.config.columns import EXTRA_COLUMNS, NORM_SUFFIX, REFERENCE
from grads_ds.scores.read import ScoreTable
from grads_ds.statistics import Floats, area_under_curve

SEES = 0.75  # an area from which a signal is believed (or 1 less it)
NEIGHBOURS = 30  # rows on either side that count as of like length
_SMALLEST = 0.25  # share of the controls below which a tail says little
_BLOCK = 100_000  # rows compared with their neighbours at a time


def wrong_kinds(table: ScoreTable) -> list[str]:
    """The kinds of control that are wrong; rows of the reference set are right."""
    return [kind for kind in table.controls if kind != REFERENCE]


def columns_of(table: ScoreTable) -> list[str]:
    """The columns that may tell what is wrong: the loss, the norms and the extra columns."""
    return [
        name
        for name in table.columns
        if name == "loss"
        or name.endswith(NORM_SUFFIX)
        or any(column.matches(name) for column in EXTRA_COLUMNS)
    ]


def within_length(
    values: Floats, lengths: Floats, pool_values: Floats, pool_lengths: Floats
) -> Floats:
    """The share of the pool's rows of like length with a lower value (equal ones count half).

    `values`, `lengths`: the rows asked about, [M]; the pool's rows: [N]. NaN stays NaN, and a NaN
    of the pool's is nobody's neighbour.
    """
    good = np.isfinite(pool_values)
    order = np.argsort(pool_lengths[good], kind="stable")
    near, at = pool_values[good][order], pool_lengths[good][order]
    width = min(len(near), 2 * NEIGHBOURS + 1)
    if not width:
        return np.full(len(values), np.nan)
    # the middle of the rows of exactly this length
    middle = (np.searchsorted(at, lengths, "left") + np.searchsorted(at, lengths, "right")) // 2
    start = np.clip(middle - width // 2, 0, len(near) - width)
    shares = np.empty(len(values))
    for first in range(0, len(values), _BLOCK):
        block = slice(first, first + _BLOCK)
        window = near[start[block, None] + np.arange(width)]
        own = values[block, None]
        shares[block] = ((window < own) + 0.5 * (window == own)).mean(axis=1)
    shares[~np.isfinite(values)] = np.nan
    return shares


def pair(
    table: ScoreTable, kind: str, column: str, by_length: bool
) -> tuple[Floats, Floats] | None:
    """The column in the pool's rows and in one kind of control; None where the controls lack it."""
    control = table.controls[kind]
    if column not in control.columns or column not in table.columns:
        return None
    pool, bad = table.floats(column), control.floats(column)
    if not by_length:
        return pool, bad
    lengths, bad_lengths = table.floats("num_target_tokens"), control.floats("num_target_tokens")
    return (
        within_length(pool, lengths, pool, lengths),
        within_length(bad, bad_lengths, pool, lengths),
    )


def areas(table: ScoreTable, by_length: bool) -> dict[str, dict[str, float]]:
    """Column -> kind of control -> area under the curve; empty without controls."""
    found: dict[str, dict[str, float]] = {}
    for column in columns_of(table):
        for kind in table.controls:
            both = pair(table, kind, column, by_length)
            area = None if both is None else area_under_curve(both[1], both[0])
            if area is not None:
                found.setdefault(column, {})[kind] = round(area, 4)
    return found


def wrong_share(pool: Floats, controls: Floats) -> float:
    """The largest share of the pool, 0 to 1, that may be like the controls, which have high values:
    min_x (S_P(x) + its standard error) / S_C(x), S_P and S_C the shares of the pool and of the
    controls at or beyond x, over S_C >= 1/4. 0 where no such x is.
    """
    _, beyond_pool, beyond = beyond_marks(pool, controls)
    error = np.sqrt(beyond_pool * (1 - beyond_pool) / max(1, np.isfinite(pool).sum()))
    enough = beyond >= _SMALLEST
    if not enough.any():
        return 0.0
    return float(min(1.0, np.min((beyond_pool[enough] + error[enough]) / beyond[enough])))


def beyond_marks(pool: Floats, controls: Floats) -> tuple[Floats, Floats, Floats]:
    """The pool's finite values x, once each and ascending, and the shares of the pool and of the
    finite controls at or beyond each.
    """
    pool, controls = np.sort(pool[np.isfinite(pool)]), np.sort(controls[np.isfinite(controls)])
    marks = np.unique(pool)
    shares = [1 - np.searchsorted(of, marks, "left") / max(1, len(of)) for of in (pool, controls)]
    return marks, shares[0], shares[1]


def best_column(found: Mapping[str, Mapping[str, float]], kind: str) -> tuple[str, float] | None:
    """The column that tells this kind best, and its area; None where none does."""
    strengths = [
        (abs(by_kind[kind] - 0.5), name) for name, by_kind in found.items() if kind in by_kind
    ]
    if not strengths:
        return None
    strength, name = max(strengths, key=lambda item: item[0])
    return (name, found[name][kind]) if strength >= SEES - 0.5 else None


def best_columns(
    table: ScoreTable, like: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, tuple[str, float]]:
    """For each wrong kind of control that some column sees: that column, and its area among rows of
    like length (`like`, where those are known already).
    """
    like = areas(table, by_length=True) if like is None else like
    found = {kind: best_column(like, kind) for kind in wrong_kinds(table)}
    return {kind: best for kind, best in found.items() if best is not None}


def report(table: ScoreTable) -> dict[str, Any] | None:
    """What selection.json says of the signals: every column's area, as it is and among rows of like
    length, per kind of control; None without controls.
    """
    if not table.controls:
        return None
    plain, like = areas(table, by_length=False), areas(table, by_length=True)
    best = best_columns(table, like)
    return {
        "controls": {kind: len(control) for kind, control in table.controls.items()},
        "sees_from": SEES,
        "area": plain,
        "area_among_like_length": like,
        "best": {kind: best.get(kind, (None,))[0] for kind in wrong_kinds(table)},
    }
