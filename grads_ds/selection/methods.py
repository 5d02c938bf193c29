"""Applies the criterion that `select.method` names: one of those in grads.py, guided.py,
baselines.py and published.py, a mixture of them by rank, or a plugin.

Their names, and the columns that each reads, are listed in config/select.py (`METHODS`); a new one
stands in published.py under its name, and nothing is added here.

A plugin is a criterion in another package: an entry point of group `grads_ds.selection` naming a
function (table, settings, seed) -> array of preferences, higher first, NaN for a sample it cannot
judge (example in docs/selection.md).
"""

from __future__ import annotations

from importlib.metadata import entry_points

import numpy as np

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.baselines import length_matched, random
from grads_ds.selection.criterion import Criterion, Scored
from grads_ds.selection.grads import grads
from grads_ds.selection.guided import guided
from grads_ds.selection.numbers import rounded
from grads_ds.selection.published import PUBLISHED
from grads_ds.statistics import rank_shares

PLUGIN_GROUP = "grads_ds.selection"


def score(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Apply the method that the settings name.

    Raises UserError for missing columns or a faulty plugin.
    """
    criterion = CRITERIA.get(settings.method, plugin)
    return criterion(table, settings, seed)


def mixture(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """The weighted mean of several methods' ranks.

    A sample that one of them cannot judge is left out.
    """
    total = sum(settings.mixture.values())
    preference = np.zeros(len(table))
    notes: dict[str, object] = {}
    warnings: list[str] = []
    for name, weight in settings.mixture.items():
        part = score(table, settings.model_copy(update={"method": name}), seed)
        preference += weight / total * rank_shares(part.preference)
        notes[name] = part.notes
        warnings += part.warnings
    return Scored(rounded(preference), rounded(preference), None, None, notes, tuple(warnings))


def plugin(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Call the third-party criterion of that name."""
    found = [entry for entry in entry_points(group=PLUGIN_GROUP) if entry.name == settings.method]
    if not found:
        raise UserError(
            f"select.method: wanted an installed plugin; found none of the name {settings.method};"
            " install it"
        )
    try:
        preference = np.asarray(found[0].load()(table, settings, seed), dtype=np.float64)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"select.method: plugin {settings.method} ({found[0].value}) failed:"
            f" {type(error).__name__}: {error}; fix it"
        ) from error
    if preference.shape != (len(table),):
        raise UserError(
            f"select.method: wanted {len(table)} preferences of plugin {settings.method}; found"
            f" shape {preference.shape}; fix it"
        )
    return Scored(preference, preference, None, None, {"plugin": found[0].value})


CRITERIA: dict[str, Criterion] = {
    "grads": grads,
    "guided": guided,
    "random": random,
    "length_matched": length_matched,
    "mixture": mixture,
    **PUBLISHED,
}
