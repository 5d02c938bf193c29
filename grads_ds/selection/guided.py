"""Method guided: believe a signal only where the controls show that it sees.

The probe scores controls, rows known to be wrong, and the columns' areas against the pool say which
of them sees what. Rows that are more like the controls than like the pool are rejected
(`filters`). What is left is ordered by the worst of its ranks, among rows of like length, on the
signals that see, or drawn, or drawn among the rows that no signal doubts (`select.spread`), and
taken in strata of length. With `spread: reference` nearness to the reference set counts as a
signal, and rows unlike its rows are rejected too; where most of the pool is unlike them (a needle
pool), nearness alone orders it. With no signal that sees, it is a random choice in strata of
length, and says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.columns import REFERENCE
from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection import control_areas
from grads_ds.selection.criterion import Scored
from grads_ds.selection.grads import CONTRAST, signal_and_density
from grads_ds.selection.numbers import random_keys, rounded, uniforms
from grads_ds.selection.region import weighted_draw
from grads_ds.statistics import Floats, area_under_curve, rank_shares

HIDDEN = "anchor_hidden_cosine"
CAUTION = 3  # rows doubted for each that may be wrong
NEARNESS = (HIDDEN, CONTRAST, "anchor_cosine_")  # columns that are high near the reference set


def guided(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """The order of `select.spread`; the filters are applied by `choose`. Raises UserError without
    controls, unless the settings name filters.
    """
    if not table.controls and not table.no_controls and not settings.filters:
        raise UserError(
            "select.method: guided wants controls in scores/controls; found none; set"
            " probe.controls: 0.05 and run the probe again, or name select.filters"
        )
    draw = uniforms(random_keys(table.sample_id, seed))
    seeing = signed_columns(table)
    notes: dict[str, object] = {"signals": dict(seeing), "spread": settings.spread}
    warnings: tuple[str, ...] = ()
    if not seeing:
        why = (
            "the probe made no controls that are wrong (its log says why): no signal is believed"
            if not control_areas.wrong_kinds(table)
            else "no recorded signal tells the controls from the pool (area 0.75 or more)"
        )
        by = (
            "nearness to the reference set" if settings.spread == "reference" else "a random choice"
        )
        warnings = (f"{why}: {by} in strata of length",)
    if settings.spread == "density":
        signal, density = signal_and_density(table, settings)
        preference = weighted_draw(density.at_samples, table.sample_id, seed)
        return Scored(preference, signal.values, density, None, notes, warnings)
    near = nearness_columns(table) if goes_by_reference(table, settings) else []
    if near:
        notes["nearness"] = near
        if needles(table):
            notes["needles"] = True
            order = rounded(np.mean([rank_shares(table.floats(column)) for column in near], axis=0))
            return Scored(order, order, None, None, notes, warnings, across_strata=True)
    if settings.spread == "doubt":
        ranks = worst_rank(table, seeing) if seeing else draw
        doubted = is_doubted(table)
        notes["doubted"] = int(np.count_nonzero(doubted))
        preference = np.where(doubted, ranks, 1 + draw)
        return Scored(preference, ranks, None, None, notes, warnings, behind=doubted)
    seeing = [*seeing, *((column, "low") for column in near)]
    ranks = worst_rank(table, seeing) if seeing else draw
    preference = draw if settings.spread == "random" else ranks
    return Scored(preference, ranks, None, None, notes, warnings)


def goes_by_reference(table: ScoreTable, settings: SelectConfig) -> bool:
    """Whether rows unlike the reference rows are rejected: with `spread: reference`, and with
    `doubt` where nearness and such controls were recorded.
    """
    recorded = REFERENCE in table.controls and any(
        name.startswith(NEARNESS) for name in table.columns
    )
    return settings.spread == "reference" or (settings.spread == "doubt" and recorded)


def nearness_columns(table: ScoreTable) -> list[str]:
    """The columns that say how near a row is to the reference set, all less what is common to the
    pool: hidden states where recorded, else the gradients of every group. Raises UserError where
    neither is.
    """
    if HIDDEN in table.columns:
        return [HIDDEN]
    return [CONTRAST + group for group in table.prefixed(CONTRAST)]


def nearest_told(table: ScoreTable) -> tuple[str, float]:
    """The column of nearness in which the reference rows lie furthest from the pool, and their area
    under the curve (0.5 where there are no such controls). Raises UserError as `nearness_columns`
    does.
    """
    areas = {}
    for column in nearness_columns(table):
        known = REFERENCE in table.controls
        both = control_areas.pair(table, REFERENCE, column, by_length=False) if known else None
        area = None if both is None else area_under_curve(both[1], both[0])
        areas[column] = 0.5 if area is None else area
    return max(areas.items(), key=lambda item: item[1])


def needles(table: ScoreTable) -> bool:
    """Whether most of the pool is unlike the reference rows, which its few others are like."""
    return nearest_told(table)[1] >= control_areas.SEES


def signed_columns(table: ScoreTable) -> list[tuple[str, str]]:
    """For each kind of control the column that sees it best, with the side that is wrong."""
    best = control_areas.best_columns(table).values()
    found = {column: "high" if area > 0.5 else "low" for column, area in best}
    return list(found.items())


def is_doubted(table: ScoreTable) -> NDArray[np.bool_]:
    """The rows [N] that some signal doubts: for each kind of control, from the most wrong-looking
    on, three times as many as the pool may hold of them, or fewer where all controls are reached.
    """
    doubted = np.zeros(len(table), bool)
    for kind, (column, area) in control_areas.best_columns(table).items():
        both = control_areas.pair(table, kind, column, by_length=True)
        assert both is not None  # it has an area
        pool, bad = (values if area > 0.5 else -values for values in both)
        share = control_areas.wrong_share(pool, bad)
        cut = max(np.nanquantile(pool, max(0.0, 1 - CAUTION * share)), np.nanmin(bad))
        doubted |= pool > cut
    return doubted


def worst_rank(table: ScoreTable, seeing: list[tuple[str, str]]) -> Floats:
    """Of each row's shares of rows of like length that look more wrong, one for each column, the
    least: a row is as good as the signal says that thinks least of it.
    """
    lengths = table.floats("num_target_tokens")
    shares = []
    for column, wrong in seeing:
        values = table.floats(column)
        share = control_areas.within_length(values, lengths, values, lengths)
        share = np.where(np.isfinite(share), share, 0.5)  # a row that the column says nothing of
        shares.append(1 - share if wrong == "high" else share)
    return rounded(np.min(shares, axis=0))
