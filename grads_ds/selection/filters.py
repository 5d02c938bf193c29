"""Rows that are never chosen, each with its reason: a column, a side, a cut (`select.filters`).

`auto` asks the controls. With S_P(x) and S_C(x) the shares of the pool and of the controls at or
beyond x on the controls' side, the share of such rows in the pool is at most
    p = min_x (S_P(x) + its standard error) / S_C(x)        over x with S_C(x) >= 1/4
and the cut is where most rows are placed rightly, max_x 2 p S_C(x) - S_P(x): beyond it a row
is more likely like the controls than not. The false rejection that it costs,
(S_P - p S_C) / (1 - p), is stated.

Against the kind `reference`, whose n rows are right, what is unlike them is rejected. Where most of
the pool is (an area of 0.75 or more), p is the share of rows like them and the same cut says from
where on rows are kept; method guided asks for it with `budget: auto` alone. Elsewhere the cut is
the k-th least reference row, k = floor(0.05 (n + 1)): a row that is as they are lies beyond it with
a chance of k / (n + 1) (conformal p-values; Bates et al. 2023, arXiv 2104.08279).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.columns import REFERENCE
from grads_ds.config.errors import UserError
from grads_ds.config.row_filter import Filter
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection import control_areas
from grads_ds.selection.guided import NEARNESS, goes_by_reference, nearest_told
from grads_ds.statistics import Floats, area_under_curve

_FALSE = 0.05  # share of rows like the reference set that a cut against it may reject


@dataclass(frozen=True)
class Rejection:
    """One filter's verdict: `rows` [N] (of the eligible rows), why in words, and its numbers for
    selection.json.
    """

    rows: NDArray[np.bool_]
    reason: str
    numbers: dict[str, Any]


def rejections(table: ScoreTable, settings: SelectConfig) -> list[Rejection]:
    """What the settings' filters reject; those of method guided, where it names none, are the best
    column for each kind of control.

    Raises UserError for a column that is not recorded, and for `auto` without controls.
    """
    wanted = list(settings.filters)
    if not wanted and settings.method == "guided":
        wanted = _of_guided(table, settings)
    return [_reject(table, wish) for wish in wanted]


def _of_guided(table: ScoreTable, settings: SelectConfig) -> list[Filter]:
    """For each kind of control the column that tells it best, and for the reference rows nearness.
    In a needle pool the controls are of what is not wanted either: they judge nothing, and nearness
    draws a line only where no budget does.
    """
    by_reference = goes_by_reference(table, settings) and REFERENCE in table.controls
    near = []
    if by_reference:
        column, area = nearest_told(table)
        near = [Filter(column=column, against=REFERENCE, by_length=False)]
        if area >= control_areas.SEES:  # needles
            return near if settings.budget == "auto" and settings.budget_tokens is None else []
    best = control_areas.best_columns(table)
    return [*(Filter(column=found[0], against=kind) for kind, found in best.items()), *near]


def _reject(table: ScoreTable, wish: Filter) -> Rejection:
    values = table.floats(wish.column)
    if wish.by_length:
        lengths = table.floats("num_target_tokens")
        values = control_areas.within_length(values, lengths, values, lengths)
    side, cut = wish.reject, wish.cut
    numbers: dict[str, Any] = {"column": wish.column, "by_length": wish.by_length}
    why = ""
    if table.no_controls and "auto" in (side, cut):
        numbers |= {"rejected": 0, "why_none": "the probe could make no controls"}
        return Rejection(np.zeros(len(table), bool), "", numbers)
    if side == "auto" or cut == "auto":
        kind, bad, area = _control(table, wish)
        numbers |= {"against": kind, "area": round(area, 4)}
        if kind == REFERENCE:
            return _unlike(wish, values, bad, area, numbers)
        why = f", like {kind} controls"
        if max(area, 1 - area) < control_areas.SEES:
            numbers |= {"rejected": 0, "why_none": f"area within {control_areas.SEES} of blind"}
            return Rejection(np.zeros(len(table), bool), "", numbers)
        side = ("high" if area > 0.5 else "low") if side == "auto" else side
        if cut == "auto":
            sign = 1.0 if side == "high" else -1.0
            found, share, false = auto_cut(sign * values, sign * bad)
            numbers |= {"estimated_share": round(share, 4), "false_rejection": round(false, 4)}
            if found is None:
                numbers |= {"rejected": 0, "why_none": "no row is more like the controls"}
                return Rejection(np.zeros(len(table), bool), "", numbers)
            cut = sign * found
    rows = values >= cut if side == "high" else values <= cut
    among = " among rows of like length" if wish.by_length else ""
    numbers |= {"reject": side, "cut": float(cut), "rejected": int(np.count_nonzero(rows))}
    edge = "from" if side == "high" else "up to"
    return Rejection(rows, f"out: {wish.column}{among} {edge} {cut:.4g}{why}", numbers)


def _unlike(
    wish: Filter, values: Floats, known: Floats, area: float, numbers: dict[str, Any]
) -> Rejection:
    """What is unlike the reference rows: see the top of this file.

    Args:
        wish: side and cut as wanted; a cut of its own is taken as it is.
        values: of the pool's rows [N].
        known: of the reference rows, finite [n].
        area: the reference rows' against the pool.
        numbers: what is known of the filter so far; the rest is added.
    """
    side = wish.reject
    if side == "auto":  # low nearness is unlike, whatever a few rows say
        side = "low" if area >= 0.5 or wish.column.startswith(NEARNESS) else "high"
    sign = 1.0 if side == "low" else -1.0
    allowed = int(_FALSE * (len(known) + 1))
    cut: float | None = None
    if wish.cut != "auto":
        cut = sign * wish.cut
    elif allowed and max(area, 1 - area) >= control_areas.SEES:
        cut, share, _ = auto_cut(sign * values, sign * known)
        numbers["estimated_share"] = round(share, 4)
    if cut is None and allowed:
        cut = float(np.sort(sign * known)[allowed - 1])
    if cut is None:
        numbers |= {"rejected": 0, "why_none": f"{len(known)} reference rows; 19 allow a cut"}
        return Rejection(np.zeros(len(values), bool), "", numbers)
    rows = sign * values < cut
    false = max(int(np.count_nonzero(sign * known < cut)), allowed) / (len(known) + 1)
    numbers |= {"reject": side, "cut": sign * cut, "rejected": int(np.count_nonzero(rows))}
    numbers |= {"false_rejection": round(float(false), 4)}
    among = " among rows of like length" if wish.by_length else ""
    edge = "below" if side == "low" else "above"
    reason = f"out: {wish.column}{among} {edge} {sign * cut:.4g}, unlike the reference rows"
    return Rejection(rows, reason, numbers)


def _control(table: ScoreTable, wish: Filter) -> tuple[str, Floats, float]:
    """The kind of control that the filter goes by, its values and the column's area against it."""
    kinds = [wish.against] if wish.against is not None else control_areas.wrong_kinds(table)
    found: list[tuple[float, str, Floats, float]] = []
    for kind in kinds:
        both = (
            control_areas.pair(table, kind, wish.column, wish.by_length)
            if (kind in table.controls)
            else None
        )
        area = None if both is None else area_under_curve(both[1], both[0])
        if both is not None and area is not None:
            found.append((abs(area - 0.5), kind, both[1][np.isfinite(both[1])], area))
    if not found:
        raise UserError(
            f"select.filters: wanted controls {wish.against or ''} with column {wish.column} for"
            f" auto; found {', '.join(table.controls) or 'none'}; set probe.controls: 0.05, or give"
            " the filter a side and a cut"
        )
    _, kind, bad, area = max(found, key=lambda item: item[0])
    return kind, bad, area


def auto_cut(pool: Floats, controls: Floats) -> tuple[float | None, float, float]:
    """The cut from which on rows are rejected (None: nowhere), the estimated share of such rows in
    the pool and the share of the other rows that the cut rejects. High values are the controls'.
    """
    marks, beyond_pool, beyond = control_areas.beyond_marks(pool, controls)
    share = control_areas.wrong_share(pool, controls)
    gain = 2 * share * beyond - beyond_pool
    best = int(np.argmax(gain))
    if gain[best] <= 0:
        return None, share, 0.0
    false = (beyond_pool[best] - share * beyond[best]) / max(1e-9, 1 - share)
    return float(marks[best]), share, float(np.clip(false, 0.0, 1.0))
