"""The section that rows are looked up in: searched, sorted, filtered, read one by one.

Gives the page one block of JSON, which templates/rows.js shows as text. A pool of more than
`row_choice.HELD` rows is held in part; its counts are exact all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from grads_ds.config.errors import UserError, printable
from grads_ds.report.examples import excerpt
from grads_ds.report.outcome import Outcome
from grads_ds.report.read_run import Run, read_rows
from grads_ds.report.row_choice import HELD, Field, counted, held_rows
from grads_ds.report.row_words import explained
from grads_ds.report.shaded_tokens import shaded_rows
from grads_ds.selection.pool import read_pool
from grads_ds.statistics import Floats, Ints

FIELDS = 8  # fields to filter by, beside the reason
TEXT_CHARACTERS = 4000  # of one row; fewer where the page would become too large
PAGE_BYTES = 8_000_000  # what the rows may take of the page
MANY = 200  # values of a metadata field from which it tells rows apart rather than kinds of them
_ANOTHER = re.compile(r"sample \d+$")


def rows(run: Run, outcome: Outcome | None) -> dict[str, Any]:
    """The block of JSON, and what the words around it say."""
    columns = columns_of(run)
    main, scores = run.subsets[0], run.scores
    held = held_rows(scores.sample_id, columns, main.selected, int(run.config.get("seed") or 0))
    fields, counts = counted(fields_of(run), main.selected)
    ids = [int(i) for i in scores.sample_id[held]]
    texts = read_rows(run.run_dir, ids)
    shaded, missing = shaded_rows(run, ids)
    block: dict[str, Any] = {
        "total": len(scores.sample_id),
        "fields": [{"name": f.name, "values": f.values} for f in fields],
        "counts": counts,
        "columns": list(columns),
        "ids": ids,
        "selected": [int(s) for s in main.selected[held]],
        "codes": [[int(c) for c in field.codes[held]] for field in fields],
        "values": [[_number(v) for v in values[held]] for values in columns.values()],
        "words": explained(run, columns, held),
        "tokens": [shaded.get(i) for i in ids],
        "missing": missing,
    }
    data, limit = _within(block, [texts.get(i, {}).get("row", "") for i in ids])
    return {
        "data": data,
        "held": len(held),
        "total": len(scores.sample_id),
        "whole": len(held) == len(scores.sample_id),
        "most": HELD,
        "limit": limit,
    }


def columns_of(run: Run) -> dict[str, Floats]:
    """Every number that rows are sorted by, float64 [N]; NaN where a row has none."""
    main, scores = run.subsets[0], run.scores
    found = {} if main.rank is None else {"rank": np.where(main.rank >= 1, main.rank, np.nan)}
    found |= {"signal": main.signal, "density": main.density, "loss": scores.loss}
    found["target tokens"] = scores.num_target_tokens.astype(np.float64)
    return found | {f"{group} norm": values for group, values in scores.norms.items()}


def fields_of(run: Run) -> list[Field]:
    """What rows are filtered by: the source, metadata that tells kinds apart, the reason."""
    fields = []
    try:
        pool = read_pool(run.run_dir / "prepared/pool")
        place = pool.positions(run.scores.sample_id)
        for name, (codes, values) in pool.fields().items():
            if name == "source" or 1 < len(values) <= MANY:
                fields.append(_field(name, codes[place], values))
    except UserError:
        pass  # no pool, or one prepared anew: the page says that there are no texts
    reason = run.subsets[0].reason
    if reason is not None:
        fields = [*fields[:FIELDS], _reasons(reason)]
    return fields[: FIELDS + 1]


def _field(name: str, codes: Ints, values: list[str]) -> Field:
    return Field(printable(name), codes, [printable(value) or "(empty)" for value in values])


def _reasons(column: pa.ChunkedArray) -> Field:
    """The reasons, those that name another sample as one."""
    coded = pc.dictionary_encode(pc.fill_null(column, "")).unify_dictionaries().combine_chunks()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    said = [_ANOTHER.sub("another sample", str(text)) for text in coded.dictionary.to_pylist()]
    words = list(dict.fromkeys(said))
    index = np.array([words.index(text) for text in said], dtype=np.int64)
    return _field("reason", index[coded.indices.to_numpy(zero_copy_only=False)], words)


def _within(block: Mapping[str, Any], texts: list[str]) -> tuple[Markup, int]:
    """The JSON with the rows' texts, each cut so that the whole stays within PAGE_BYTES; and where
    they were cut. Shaded tokens are given up last.
    """
    limit = TEXT_CHARACTERS
    while True:
        cut = [excerpt(text, limit) if text else [] for text in texts]
        data = as_data({**block, "texts": cut})
        if len(data.encode()) <= PAGE_BYTES or limit < 100:
            return data, limit
        limit //= 2


def as_data(value: Any) -> Markup:
    """JSON that can stand in a <script> element: no character of it is one that HTML or whoever
    reads the page acts on.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    acted_on = {c for c in set(text) if c in "<>&" or printable(c) != c}
    for character in acted_on:  # they occur inside strings alone
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None
