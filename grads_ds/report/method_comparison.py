"""selection/comparison.json -> the page's tables of every method at the same budgets: kinds kept,
overlap with the main choice. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grads_ds.config.errors import printable

# values of a field with a column of their own, those with the most varied shares first
KINDS_SHOWN = 8


@dataclass(frozen=True)
class Kept:
    """The share of a kind that a method keeps, and that share over the budget (1: as a random draw
    would).
    """

    share: float
    lift: float


@dataclass(frozen=True)
class MethodLine:
    """One method: per budget its share of the main choice's samples (None: the main choice is
    empty), and what it keeps.
    """

    method: str
    overlap: list[float | None]
    kept: list[list[Kept]]  # [budget][kind]


@dataclass(frozen=True)
class MethodTable:
    """All methods by the values of one field."""

    field: str
    kinds: list[str]
    lines: list[MethodLine]


@dataclass(frozen=True)
class MethodComparison:
    """Everything compared. `skipped`: method -> why it could not be run."""

    budgets: list[float]
    selected: int
    tables: list[MethodTable]
    skipped: dict[str, str]


def method_comparison(
    comparison: Mapping[str, Any] | None, selected: int
) -> MethodComparison | None:
    """The tables, one per field (one without kinds when no field tells samples apart); None when
    nothing was compared.

    `selected`: how many samples the main choice has.
    """
    if not comparison or not comparison.get("methods"):
        return None
    keys, methods = [str(key) for key in comparison["budgets"]], comparison["methods"]
    first = next(iter(methods.values()))[keys[0]]["kept"]
    tables = [
        _table(field, list(values), keys, methods, selected) for field, values in first.items()
    ]
    tables = tables or [_table("", [], keys, methods, selected)]
    skipped = {str(name): str(why) for name, why in comparison.get("skipped", {}).items()}
    return MethodComparison([float(key) for key in keys], selected, tables, skipped)


def _table(
    field: str, kinds: list[str], keys: list[str], methods: Mapping[str, Any], selected: int
) -> MethodTable:
    def shares(kind: str) -> list[float]:
        return [entry[key]["kept"][field][kind] for entry in methods.values() for key in keys]

    if len(kinds) > KINDS_SHOWN:
        telling = sorted(kinds, key=lambda kind: (min(shares(kind)) - max(shares(kind)), kind))[
            :KINDS_SHOWN
        ]
        kinds = [kind for kind in kinds if kind in telling]
    lines = []
    for method, entry in methods.items():
        overlap = [
            entry[key]["overlap_with_selected"] / selected if selected else None for key in keys
        ]
        kept = [
            [
                Kept(share, share / float(key))
                for kind in kinds
                for share in [entry[key]["kept"][field][kind]]
            ]
            for key in keys
        ]
        lines.append(MethodLine(printable(method), overlap, kept))
    return MethodTable(printable(field), [printable(kind) or "(empty)" for kind in kinds], lines)
