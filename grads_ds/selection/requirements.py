"""What a selection will ask of the score table, known before the probe spends hours on recording
it.

Reads the config, and the columns of an existing scores/table.parquet; writes nothing.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from grads_ds.config.config import Config
from grads_ds.config.probe import LAYER_GROUPS
from grads_ds.config.select import SelectConfig

# method -> the column it wants; column -> the item of probe.extras that records it
_EXTRA = {
    "ifd": "ifd",
    "el2n": "el2n",
    "snr": "<group>_grad_norm_early",
    "anchor_conflict": "anchor_cosine_<group>",
    "orthogonal": "anchor_cosine_<group>",
    "less": "anchor_inner_product_<group>",
}
_RECORDED_BY = {
    "ifd": "ifd",
    "el2n": "el2n",
    "<group>_grad_norm_early": "early",
    "anchor_cosine_<group>": "anchor",
    "anchor_inner_product_<group>": "anchor",
}


def check_select(config: Config, run_dir: Path) -> list[str]:
    """Faults of `select` and its variants that the probe, as configured, would leave: columns it
    will not record, strata that the pool will not carry.
    """
    have = recorded(config, run_dir)
    faults = []
    for name in (None, *config.select.variants):
        where = "select" if name is None else f"select.variants.{name}"
        settings = config.select.resolve(name)
        for column in sorted(needed(settings)):
            if not _there(column, have):
                faults.append(_fault(where, column, config))
        known = ["source", *config.data.metadata]
        if settings.strata is not None and settings.strata not in known:
            faults.append(
                f"{where}.strata: wanted one of {', '.join(known)}; found {settings.strata}; choose"
                " one of these or add it to data.metadata"
            )
    return faults


def needed(settings: SelectConfig) -> set[str]:
    """Columns without which the choice fails; a plugin's are its own affair."""
    if settings.method == "mixture":
        parts = [settings.model_copy(update={"method": name}) for name in settings.mixture]
        return set().union(*(needed(part) for part in parts))
    if settings.method in _EXTRA:
        return {_EXTRA[settings.method]}
    if settings.method not in ("grads", "length_matched"):
        return set()
    groups = settings.groups if settings.signal in SelectConfig.COMBINATIONS else [settings.signal]
    columns = {f"{group}_grad_norm" for group in groups}
    return columns | ({"anchor_cosine_<group>"} if settings.forget_less > 0 else set())


def recorded(config: Config, run_dir: Path) -> set[str]:
    """Columns that the probe will record, and those of a table that is already there."""
    layers = config.probe.layers
    groups = [*LAYER_GROUPS, "total"] if layers == "all" else layers
    have = {f"{group}_grad_norm" for group in groups}
    have |= {
        column.replace("<group>", group)
        for column, extra in _RECORDED_BY.items()
        if extra in config.probe.extras
        for group in groups
    }
    table = run_dir / "scores" / "table.parquet"
    return have | set(pq.read_schema(table).names) if table.is_file() else have


def _there(column: str, have: set[str]) -> bool:
    before, _, after = column.partition("<group>")
    return (
        any(name.startswith(before) and name.endswith(after) for name in have)
        if "<" in column
        else column in have
    )


def _fault(where: str, column: str, config: Config) -> str:
    group = column.removesuffix("_grad_norm")
    if group in LAYER_GROUPS or group == "total":
        layers = "all" if group == "total" else f"[{', '.join([*config.probe.layers, group])}]"
        return (
            f"{where}: wanted the norms of group {group}; probe.layers records "
            f"{', '.join(config.probe.layers)}; set probe.layers: {layers}"
        )
    extra = _RECORDED_BY[column]
    change = f"add {extra} to probe.extras" + (
        " and name its set in probe.anchor" if extra == "anchor" else ""
    )
    return (
        f"{where}: wanted column {column} in the score table; the probe does not record it as"
        f" configured; {change}, or choose another method"
    )


def anchor_leak(config: Config, settings: SelectConfig) -> str | None:
    """What to say when a choice looks at an anchor that is also evaluated: that set's gain is no
    longer held out.
    """
    if "anchor" not in config.probe.extras or config.anchor_sources():
        return None
    if not any(_RECORDED_BY.get(column) == "anchor" for column in needed(settings)):
        return None
    return (
        f"the choice looks at the held-out set {config.anchor_set()} (probe.anchor): its loss after"
        " training is no longer a fair test; give probe.anchor files of their own"
    )
