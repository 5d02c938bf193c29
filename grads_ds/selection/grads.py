"""GrADS: signal, density and region of the gradient norms."""

from __future__ import annotations

import numpy as np

from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection import region
from grads_ds.selection.criterion import Scored
from grads_ds.selection.density import Density, estimate
from grads_ds.selection.joint_density import estimate_joint
from grads_ds.selection.numbers import rounded
from grads_ds.selection.signal import Signal, build_signal
from grads_ds.statistics import Floats, rank_shares

CONTRAST = "anchor_contrast_"


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
    with the reference set.
    """
    signal, density = signal_and_density(table, settings)
    preference = region.preference(
        settings, table.sample_id, signal.values, density.at_samples, signal.magnitude, seed
    )
    notes = dict(signal.notes)
    warnings = list(density.warnings)
    groups = settings.groups if settings.signal in SelectConfig.COMBINATIONS else []
    if len(groups) > 1 and all(
        np.array_equal(table.norms(groups[0]), table.norms(g)) for g in groups[1:]
    ):
        warnings.append(
            f"groups {', '.join(groups)} have the same norms, as tied weights do: the signal is one"
            " group's"
        )
    if settings.region == "band":
        notes["band_edges"] = list(region.band_edges(signal.values, settings.band))
    gain = {"density": density.at_samples, "sample": density.at_samples, "mass": preference}.get(
        settings.region, signal.magnitude
    )
    if settings.forget_less > 0:
        against = conflict(table)
        preference = rounded(rank_shares(preference) - settings.forget_less * against)
        notes["conflicting_with_anchor"] = int(np.count_nonzero(against > 0))
        notes["mean_conflict"] = round(float(np.mean(against)), 9)
    return Scored(preference, signal.values, density, gain, notes, tuple(warnings))


def conflict(table: ScoreTable) -> Floats:
    """How far each sample's gradient opposes the reference set's: max(0, -cosine), the mean over
    the recorded groups.
    """
    cosines = cosines_of(table)
    return rounded(
        np.mean([np.maximum(0.0, -np.nan_to_num(value)) for value in cosines.values()], axis=0)
    )


def cosines_of(table: ScoreTable) -> dict[str, Floats]:
    """Cosine with the reference set's gradient by group, less the cosine with the pool's mean where
    that was recorded: what all samples share says nothing of one.
    """
    contrasted = any(name.startswith(CONTRAST) for name in table.columns)
    return table.prefixed(CONTRAST if contrasted else "anchor_cosine_")


def mean_cosine(table: ScoreTable) -> Floats:
    """The mean of `cosines_of` over the groups."""
    return rounded(np.mean(list(cosines_of(table).values()), axis=0))
