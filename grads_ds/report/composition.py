"""The page's tables: composition of every subset, norms, and single samples as text. Pure, but for
the pool's rows it asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grads_ds.config.errors import printable
from grads_ds.report.read_run import Bools, Run, Scores
from grads_ds.statistics import Floats, spearman

LISTED = 16  # values of a field with a line of their own; the rest are summed


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Cell:
    """One value's part in one subset. `lift`: its share of the subset over its share of the pool;
    None when undefined.
    """

    count: int
    share: float
    lift: float | None


@dataclass(frozen=True)
class Line:
    """One value of a field: how much of the pool it is, and its cell in every subset."""

    value: str
    pool: int
    share: float
    cells: list[Cell]


def composition(run: Run) -> dict[str, list[Line]]:
    """Field -> lines. Length quartiles first made here, then source and metadata as selection.json
    counted them.
    """
    tables: dict[str, list[Line]] = {}
    main = run.subsets[0].report.get("composition") or {}
    for field in main:
        counted = [subset.report.get("composition", {}).get(field, {}) for subset in run.subsets]
        values = sorted(counted[0], key=lambda v: (-counted[0][v]["pool"], v))
        entries = [
            (v, int(counted[0][v]["pool"]), [int(c.get(v, {}).get("selected", 0)) for c in counted])
            for v in values
        ]
        tables[field] = _lines(entries)
    tables["length"] = _lines(
        length_quartiles(run.scores, [subset.selected for subset in run.subsets])
    )
    return tables


def length_quartiles(scores: Scores, chosen: list[Bools]) -> list[tuple[str, int, list[int]]]:
    """(name, samples of the pool, samples of each subset) by quartile of target tokens among the
    samples of status ok.
    """
    lengths = scores.num_target_tokens[scores.ok]
    if not len(lengths):
        return []
    tops = sorted(
        {int(q) for q in np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf")}
    )
    part = np.searchsorted(tops, lengths)
    entries = []
    for i, top in enumerate(tops):
        inside = part == i
        low = int(lengths[inside].min())
        name = f"{low:,} to {top:,} tokens" if low < top else f"{top:,} tokens"
        entries.append(
            (name, int(inside.sum()), [int((inside & mask[scores.ok]).sum()) for mask in chosen])
        )
    return entries


def _lines(entries: list[tuple[str, int, list[int]]]) -> list[Line]:
    if not entries:
        return []
    total = max(1, sum(pool for _, pool, _ in entries))
    sizes = [
        max(1, sum(column)) for column in zip(*(counts for _, _, counts in entries), strict=True)
    ]
    kept = entries[:LISTED]
    rest = entries[LISTED:]
    if rest:
        kept = [
            *kept,
            (
                f"({len(rest)} more values)",
                sum(p for _, p, _ in rest),
                [sum(column) for column in zip(*(c for _, _, c in rest), strict=True)],
            ),
        ]
    lines = []
    for value, pool, counts in kept:
        share = pool / total
        cells = [
            Cell(n, n / size, n / size / share if pool else None)
            for n, size in zip(counts, sizes, strict=True)
        ]
        lines.append(Line(printable(value) or "(empty)", pool, share, cells))
    return lines


def norm_table(scores: Scores) -> list[tuple[str, list[float], int]]:
    """(name, QUANTILES, number of finite values) of the loss, the length and every norm, over
    samples of status ok.
    """
    columns = {"loss": scores.loss, "target tokens": scores.num_target_tokens.astype(float)}
    columns |= {f"{group} norm": values for group, values in scores.norms.items()}
    table = []
    for name, values in columns.items():
        values = values[scores.ok & np.isfinite(values)]
        table.append(
            (
                name,
                [float(q) for q in np.quantile(values, QUANTILES)] if len(values) else [],
                len(values),
            )
        )
    return table


def rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's rank correlation of the pairs that are finite; None with fewer than three or when
    one is constant.
    """
    both = np.isfinite(x) & np.isfinite(y)
    return spearman(x[both], y[both]) if both.sum() >= 3 else None
