"""The criteria by name: GrADS itself, its controls (random, length_matched), mixtures by rank, the
rivals, and plugins.

A criterion is a function (table of eligible rows, settings, seed) -> Scored. A plugin is the same
in another package: an entry point of group `grads_ds.selection` naming a function (table, settings,
seed) -> array of preferences, higher first, NaN for a sample it cannot judge (example in
docs/selection.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import numpy as np
from numpy.typing import NDArray

from grads_ds.config import SelectConfig, UserError
from grads_ds.selection import region
from grads_ds.selection.density import Density, estimate, estimate_joint
from grads_ds.selection.numbers import Floats, random_keys, rank_shares, rounded, uniforms
from grads_ds.selection.signal import Signal, build_signal
from grads_ds.selection.table import ScoreTable

PLUGIN_GROUP = "grads_ds.selection"
BINS, BIN_SAMPLES = 200, 20  # of length_matched: the most bins, the fewest samples in one


@dataclass(frozen=True)
class Scored:
    """What a criterion says of each row: `preference` (higher first, NaN: cannot judge), the
    `signal` it looks at, that signal's density where it is part of the method, and notes for
    selection.json.
    """

    preference: Floats
    signal: Floats
    density: Density | None = None
    gain: Floats | None = None  # what budget auto weighs; None: the method has no shape to adapt to
    notes: dict[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


Criterion = Callable[[ScoreTable, SelectConfig, int], Scored]


def score(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Apply the method that the settings name.

    Raises UserError for missing columns or a faulty plugin.
    """
    from grads_ds.selection.rivals import RIVALS

    built_in: dict[str, Criterion] = {
        "grads": grads,
        "random": random,
        "length_matched": length_matched,
        "mixture": mixture,
        **RIVALS,
    }
    if settings.method in built_in:
        return built_in[settings.method](table, settings, seed)
    return plugin(table, settings, seed)


def signal_and_density(table: ScoreTable, settings: SelectConfig) -> tuple[Signal, Density]:
    """GrADS's signal of each row and its kernel density."""
    signal = build_signal(table, settings)
    if signal.parts is not None:
        return signal, estimate_joint(*signal.parts, bandwidth=settings.bandwidth)
    mirror = signal.zero if settings.boundary == "auto" else None
    if settings.boundary == "mirror":
        # without a natural zero the smallest value is the end of the axis
        mirror = signal.zero if signal.zero is not None else float(signal.values.min())
    return signal, estimate(signal.values, settings.bandwidth, mirror)


def grads(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Gradient-aware data selection: signal, density, region; with `forget_less`, less the conflict
    with an anchor.
    """
    signal, density = signal_and_density(table, settings)
    wanted = region.preference(
        settings, table.sample_id, signal.values, density.at_samples, signal.magnitude, seed
    )
    notes = dict(signal.notes)
    heard = list(density.warnings)
    groups = settings.groups if settings.signal in SelectConfig.COMBINATIONS else []
    if len(groups) > 1 and all(
        np.array_equal(table.norms(groups[0]), table.norms(g)) for g in groups[1:]
    ):
        heard.append(
            f"groups {', '.join(groups)} have the same norms, as tied weights do: the signal is one"
            " group's"
        )
    if settings.region == "band":
        notes["band_edges"] = list(region.band_edges(signal.values, settings.band))
    gain = {"density": density.at_samples, "sample": density.at_samples, "mass": wanted}.get(
        settings.region, signal.magnitude
    )
    if settings.forget_less > 0:
        against = conflict(table)
        wanted = rounded(rank_shares(wanted) - settings.forget_less * against)
        notes["conflicting_with_anchor"] = int(np.count_nonzero(against > 0))
        notes["mean_conflict"] = round(float(np.mean(against)), 9)
    return Scored(wanted, signal.values, density, gain, notes, tuple(heard))


def conflict(table: ScoreTable) -> Floats:
    """How far each sample's gradient opposes the anchor's: max(0, -cosine), the mean over the
    recorded groups.
    """
    cosines = table.prefixed("anchor_cosine_")
    return rounded(
        np.mean([np.maximum(0.0, -np.nan_to_num(value)) for value in cosines.values()], axis=0)
    )


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
    wanted = np.empty(len(table))
    wanted[drawn] = scored.preference[ranked]
    notes: dict[str, object] = {"length_bins": len(np.unique(of_sample))}
    return Scored(wanted, scored.signal, scored.density, scored.gain, notes, scored.warnings)


def length_bins(lengths: Floats) -> NDArray[np.int64]:
    """The bin of each sample: samples ranked by length, cut into equal parts; equal lengths are
    never parted.
    """
    parts = int(np.clip(len(lengths) // BIN_SAMPLES, 1, BINS))
    shorter = np.searchsorted(np.sort(lengths), lengths, side="left")
    return np.asarray(shorter * parts // len(lengths), dtype=np.int64)


def mixture(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """The weighted mean of several methods' ranks.

    A sample that one of them cannot judge is left out.
    """
    total = sum(settings.mixture.values())
    wanted = np.zeros(len(table))
    notes: dict[str, object] = {}
    heard: list[str] = []
    for name, weight in settings.mixture.items():
        part = score(table, settings.model_copy(update={"method": name}), seed)
        wanted += weight / total * rank_shares(part.preference)
        notes[name] = part.notes
        heard += part.warnings
    return Scored(rounded(wanted), rounded(wanted), None, None, notes, tuple(heard))


def plugin(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Call the third-party criterion of that name."""
    found = [entry for entry in entry_points(group=PLUGIN_GROUP) if entry.name == settings.method]
    if not found:
        raise UserError(
            f"select.method: wanted an installed plugin; found none of the name {settings.method};"
            " install it"
        )
    try:
        wanted = np.asarray(found[0].load()(table, settings, seed), dtype=np.float64)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"select.method: plugin {settings.method} ({found[0].value}) failed:"
            f" {type(error).__name__}: {error}; mend it"
        ) from error
    if wanted.shape != (len(table),):
        raise UserError(
            f"select.method: wanted {len(table)} preferences of plugin {settings.method}; found"
            f" shape {wanted.shape}; mend it"
        )
    return Scored(wanted, wanted, None, None, {"plugin": found[0].value})
