"""The page's tables: composition of every subset, norms, and single samples as text. Pure, but for
the pool's rows it asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from grads_ds.report.read_run import Bools, Floats, Run, Scores, Subset

LISTED = 16  # values of a field with a line of their own; the rest are summed
EXAMPLES = 5
EXCERPT = 600  # characters of a sample's text
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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


@dataclass(frozen=True)
class Example:
    """One sample: its numbers and its text as (role, text) parts."""

    sample_id: int
    signal: float
    norms: dict[str, float]
    loss: float
    target_tokens: int
    selected: bool
    rank: int | None
    reason: str
    source: str
    metadata: list[tuple[str, str]]
    parts: list[tuple[str, str]]


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
    from scipy.stats import rankdata

    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3:
        return None
    a, b = rankdata(x[both]), rankdata(y[both])
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def examples(
    run: Run, read: Callable[[list[int]], dict[int, dict[str, str]]]
) -> list[tuple[str, str, list[Example]]]:
    """(title, how to read it, samples): highest and lowest signal, and what the rule preferred
    most.
    """
    main, scores = run.subsets[0], run.scores
    finite = np.flatnonzero(np.isfinite(main.signal) & scores.ok)
    order = finite[np.argsort(main.signal[finite], kind="stable")]
    groups = [
        (
            "Highest signal",
            "The largest gradients of the pool: hard, unusual, or broken samples.",
            order[::-1][:EXAMPLES],
        ),
        (
            "Lowest signal",
            "The smallest gradients: what the model knows already, or trivial text.",
            order[:EXAMPLES],
        ),
    ]
    if main.rank is not None:
        ranked = np.flatnonzero(main.rank >= 1)
        best = ranked[np.argsort(main.rank[ranked], kind="stable")][:EXAMPLES]
        groups.append(("Preferred most", "What the selection rule ranks first.", best))
    rows = read([int(scores.sample_id[i]) for _, _, places in groups for i in places])
    return [
        (title, hint, [_example(scores, main, int(i), rows) for i in places])
        for title, hint, places in groups
        if len(places)
    ]


def _example(scores: Scores, main: Subset, i: int, rows: dict[int, dict[str, str]]) -> Example:
    sample_id = int(scores.sample_id[i])
    row = rows.get(sample_id, {})
    rank = None if main.rank is None or not main.rank[i] >= 1 else int(main.rank[i])
    try:
        metadata = json.loads(row.get("metadata") or "{}")
    except ValueError:
        metadata = {}
    return Example(
        sample_id=sample_id,
        signal=float(main.signal[i]),
        norms={group: float(values[i]) for group, values in scores.norms.items()},
        loss=float(scores.loss[i]),
        target_tokens=int(scores.num_target_tokens[i]),
        selected=bool(main.selected[i]),
        rank=rank,
        reason="" if main.reason is None else str(main.reason[i].as_py() or ""),
        source=printable(row.get("source", "")),
        metadata=(
            [(printable(k), printable(_text(v))[:80]) for k, v in metadata.items()]
            if isinstance(metadata, dict)
            else []
        ),
        parts=excerpt(row["row"]) if "row" in row else [],
    )


def excerpt(row: str, limit: int = EXCERPT) -> list[tuple[str, str]]:
    """A row's JSON as (role, text) parts, together about `limit` characters; what is cut ends in an
    ellipsis.

    Short parts are kept whole and leave their room to the long ones, so that a long prompt does not
    hide the answer.
    """
    parts = [(printable(role), printable(text).strip()) for role, text in _parts(row)]
    parts = [part for part in parts if part[1]][:12]
    room, allowed = limit, {}
    for done, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i][1]))):
        allowed[i] = min(len(parts[i][1]), room // (len(parts) - done))
        room -= allowed[i]
    return [
        (role, text if len(text) <= allowed[i] else text[: allowed[i]].rstrip() + "…")
        for i, (role, text) in enumerate(parts)
    ]


def _parts(row: str) -> list[tuple[str, str]]:
    try:
        value = json.loads(row)
    except ValueError:
        return [("row", row)]
    if not isinstance(value, dict):
        return [("row", _text(value))]
    for key in ("messages", "conversations"):
        turns = value.get(key)
        if isinstance(turns, list) and turns and all(isinstance(t, dict) for t in turns):
            return [
                (
                    str(t.get("role") or t.get("from") or "?"),
                    _text(t.get("content", t.get("value", ""))),
                )
                for t in turns
            ]
    return [(str(key), _text(text)) for key, text in value.items() if text not in (None, "")]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def printable(text: str) -> str:
    """Text without control characters, text-direction overrides and lone surrogates, which no HTML
    page can hold.
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
