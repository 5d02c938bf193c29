"""Single samples as text: chosen ones and others, printable and cut to an excerpt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from grads_ds.config.errors import printable
from grads_ds.report.read_run import Run, Scores, Subset

EXAMPLES = 5
EXCERPT = 600  # characters of a sample's text


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

    Short parts are kept whole and leave their budget to the long ones, so that a long prompt does
    not hide the answer.
    """
    parts = [
        (printable(role), printable(text.replace("\r\n", "\n")).strip())
        for role, text in _parts(row)
    ]
    parts = [part for part in parts if part[1]][:12]
    budget, allowed = limit, {}
    for done, i in enumerate(sorted(range(len(parts)), key=lambda i: len(parts[i][1]))):
        allowed[i] = min(len(parts[i][1]), budget // (len(parts) - done))
        budget -= allowed[i]
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
