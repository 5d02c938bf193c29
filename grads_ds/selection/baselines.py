"""Baselines: random subsets, plain or of like lengths, which a selection has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.criterion import Scored
from grads_ds.selection.grads import grads, signal_and_density
from grads_ds.selection.numbers import random_keys, uniforms
from grads_ds.statistics import Floats

# of length_matched: the most bins, the fewest samples in one
BINS = 200


BIN_SAMPLES = 20


def random(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Uniformly at random, from the seed and the sample's id; the signal shown is GrADS's, for
    comparison.
    """
    draw = uniforms(random_keys(table.sample_id, seed))
    try:
        signal, density = signal_and_density(table, settings)
    except UserError:  # the groups of the signal were not recorded: nothing to show
        return Scored(draw, draw)
    return Scored(draw, signal.values, density, None, dict(signal.notes), density.warnings)


def length_matched(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """A control: random, but as long as what GrADS chooses. Within bins of like length, GrADS's
    preferences are dealt out at random.

    At every budget the subset holds as many samples of each bin as GrADS's at the same settings.
    Bins: up to 200, of 20 samples or more each where lengths differ; equal lengths share a bin.
    """
    scored = grads(table, settings, seed)
    of_sample = length_bins(table.floats("num_target_tokens"))
    ranked = np.lexsort((-scored.preference, of_sample))  # by bin, then as GrADS prefers them
    # by bin, then at random
    drawn = np.lexsort((random_keys(table.sample_id, seed, purpose=5), of_sample))
    preference = np.empty(len(table))
    preference[drawn] = scored.preference[ranked]
    notes: dict[str, object] = {"length_bins": len(np.unique(of_sample))}
    return Scored(preference, scored.signal, scored.density, scored.gain, notes, scored.warnings)


def length_bins(lengths: Floats, most: int = BINS) -> NDArray[np.int64]:
    """The bin of each sample: samples ranked by length, cut into equal parts; equal lengths are
    never parted. At most `most` bins of 20 samples or more.
    """
    parts = int(np.clip(len(lengths) // BIN_SAMPLES, 1, most))
    shorter = np.searchsorted(np.sort(lengths), lengths, side="left")
    return np.asarray(shorter * parts // len(lengths), dtype=np.int64)
