"""Pools with controls, made up: what the tests of method guided choose from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.baselines import length_bins
from grads_ds.selection.choose import Choice, choose
from selection.pools import score_table

N = 600


def pool_with_controls(
    gap: float, share: float = 0.2, seed: int = 0, with_general: bool = True
) -> tuple[ScoreTable, np.ndarray]:
    """A pool of which `share` are wrong: their ifd lies `gap` above what rows of their length have;
    controls as the wrong rows are. ifd falls with length far more than it tells right from wrong.
    """
    draw = np.random.default_rng(seed)
    wrong = draw.random(N) < share

    def column(bad: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return draw.normal(gap * bad, 1.0) - 20 * np.log(tokens)

    table = score_table(N, seed)
    tokens = table.floats("num_target_tokens")
    table = replace(table, columns={**table.columns, "ifd": column(wrong, tokens)})
    control = score_table(80, seed + 1)
    of_controls = column(np.ones(80, bool), control.floats("num_target_tokens"))
    control = replace(control, columns={**control.columns, "ifd": of_controls})
    blind = score_table(40, seed + 2)
    blind_ifd = column(np.zeros(40, bool), blind.floats("num_target_tokens"))
    blind = replace(blind, columns={**blind.columns, "ifd": blind_ifd})
    controls = {"swapped": control} | ({"general": blind} if with_general else {})
    return replace(table, controls=controls), wrong


def chosen(table: ScoreTable, **settings: Any) -> Choice:
    picked = SelectConfig(**{"method": "guided"} | settings)
    strata = length_bins(table.floats("num_target_tokens"), 10)
    return choose(table, picked, 0, strata)


def with_reference(
    share: float, known: int, gap: float = 6.0, seed: int = 0
) -> tuple[ScoreTable, np.ndarray]:
    """A pool whose ifd is blind, of which `share` lie `gap` further from the reference set than its
    own rows do.
    """
    draw = np.random.default_rng(seed)
    table, _ = pool_with_controls(gap=0.0, with_general=False, seed=seed)
    off = draw.random(N) < share
    near = draw.normal(-gap * off, 1.0)
    control = score_table(known, seed + 3)
    own = {"anchor_hidden_cosine": draw.normal(0.0, 1.0, known), "ifd": np.zeros(known)}
    controls = {"reference": replace(control, columns={**control.columns, **own})}
    table = replace(table, columns={**table.columns, "anchor_hidden_cosine": near})
    return replace(table, controls=dict(table.controls) | controls), off
