"""What a selection will ask of the score table, known before the probe spends hours on recording
it.

Reads the config, and the columns of an existing scores/table.parquet; writes nothing.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from grads_ds.config.columns import (
    EXTRA_COLUMNS,
    FIRST,
    GROUP,
    LAYER_GROUPS,
    NORM_SUFFIX,
    REFERENCE,
    extra_columns,
    how_to_record,
    norm_columns,
    wants_reference,
)
from grads_ds.config.config import Config
from grads_ds.config.select import COSINE, SelectConfig


def check_select(config: Config, run_dir: Path) -> list[str]:
    """Problems of `select` and its variants that the probe, as configured, would leave: columns it
    will not record, strata that the pool will not carry.
    """
    have = recorded(config, run_dir)
    problems = []
    for name in (None, *config.select.variants):
        where = "select" if name is None else f"select.variants.{name}"
        settings = config.select.resolve(name)
        for column in sorted(needed(settings)):
            if not _there(column, have):
                problems.append(_problem(where, column, config))
        if _lacks_controls(config, settings, run_dir):
            problems.append(
                f"{where}: wanted controls, by which guided and filters on auto go; found"
                " probe.controls 0; set probe.controls: 0.05, or give every filter a side and a cut"
            )
        if _lacks_reference(config, settings, run_dir):
            problems.append(
                f"{where}.filters: wanted reference rows as controls; found no probe.anchor that"
                " any of probe.extras asks for; add hidden to probe.extras and name their set in"
                " probe.anchor"
            )
        known = ["source", *config.data.metadata, "length"]
        if settings.strata is not None and settings.strata not in known:
            problems.append(
                f"{where}.strata: wanted one of {', '.join(known)}; found {settings.strata}; choose"
                " one of these or add it to data.metadata"
            )
    return problems


def needed(settings: SelectConfig) -> set[str]:
    """Columns without which the choice fails; a plugin's are its own affair."""
    if settings.method == "mixture":
        parts = [settings.model_copy(update={"method": name}) for name in settings.mixture]
        return set().union(*(needed(part) for part in parts))
    filtered = {entry.column for entry in settings.filters}
    columns = filtered | set(SelectConfig.METHODS.get(settings.method, ()))
    if settings.method == "guided" and settings.spread == "reference":
        columns.add("anchor_hidden_cosine | anchor_contrast_<group>")
    by_signal = settings.method in ("grads", "length_matched")
    if not by_signal and not (settings.method == "guided" and settings.spread == "density"):
        return columns
    groups = settings.groups if settings.signal in SelectConfig.COMBINATIONS else [settings.signal]
    columns |= {group + NORM_SUFFIX for group in groups}
    return columns | ({COSINE} if settings.forget_less > 0 else set())


def recorded(config: Config, run_dir: Path) -> set[str]:
    """Columns that the probe will record, and those of a table that is already there."""
    layers = config.probe.layers
    have = {name for name, _ in FIRST} | {*norm_columns(layers)}
    have |= {*extra_columns(config.probe.extras, layers)}
    table = run_dir / "scores" / "table.parquet"
    return have | set(pq.read_schema(table).names) if table.is_file() else have


def _there(wanted: str, have: set[str]) -> bool:
    """Whether a column, or one of several, is recorded; `<group>` stands for any group."""
    for column in wanted.split(" | "):
        before, group, after = column.partition(GROUP)
        if any(
            (name.startswith(before) and name.endswith(after)) if group else name == column
            for name in have
        ):
            return True
    return False


def _problem(where: str, wanted: str, config: Config) -> str:
    column = wanted.split(" | ")[0]
    group = column.removesuffix(NORM_SUFFIX)
    if group in LAYER_GROUPS or group == "total":
        layers = "all" if group == "total" else f"[{', '.join([*config.probe.layers, group])}]"
        return (
            f"{where}: wanted the norms of group {group}; probe.layers records "
            f"{', '.join(config.probe.layers) or 'none'}; set probe.layers: {layers}"
        )
    return (
        f"{where}: wanted column {wanted.replace(' | ', ' or ')} in the score table; the probe does"
        f" not record it as configured; {how_to_record(column)}, or choose another method"
    )


def _lacks_controls(config: Config, settings: SelectConfig, run_dir: Path) -> bool:
    """Whether the choice goes by controls that neither the probe records nor the run holds."""
    automatic = [f for f in settings.filters if f.reject == "auto" or f.cut == "auto"]
    by_controls = bool(automatic) or (settings.method == "guided" and not settings.filters)
    there = (run_dir / "scores/controls/table.parquet").is_file()
    return by_controls and not config.probe.controls and not there


def _lacks_reference(config: Config, settings: SelectConfig, run_dir: Path) -> bool:
    """Whether a filter goes by reference rows that neither the probe records nor the run holds."""
    wanted = any(f.against == REFERENCE and "auto" in (f.reject, f.cut) for f in settings.filters)
    there = (run_dir / "scores/controls/table.parquet").is_file()
    return wanted and not wants_reference(config.probe.extras) and not there


def anchor_leak(config: Config, settings: SelectConfig) -> str | None:
    """What to say when a choice looks at a reference set that is also evaluated: that set's gain is
    no longer held out.
    """
    if config.probe.anchor is None or config.anchor_sources():
        return None
    against = {column.name for column in EXTRA_COLUMNS if column.reference}
    looked_at = {column for wanted in needed(settings) for column in wanted.split(" | ")}
    # guided takes whatever column tells the controls best
    if settings.method != "guided" and not against & looked_at:
        return None
    return (
        f"the choice looks at the held-out set {config.anchor_set()} (probe.anchor): its loss after"
        " training is no longer a fair test; give probe.anchor files of their own"
    )
