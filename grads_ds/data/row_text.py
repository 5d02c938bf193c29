"""A sample's row as the JSON that is stored, and what makes a row unfit to be stored. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

from grads_ds.data.formats import Sample
from grads_ds.data.problems import RowProblem

ROW_LARGEST = 64 * 2**20  # characters of a row as JSON
NO_NUMBERS = "rows with NaN or Infinity, written as null"


def row_text(sample: Sample) -> tuple[str, tuple[str, ...]]:
    """(the row as JSON; the sample's notes and those of the writing). Raises RowProblem."""
    notes = sample.notes
    try:
        row = _json(sample.row)
    except ValueError:
        row = _json(_without_nan(sample.row))
        notes = (*notes, NO_NUMBERS)
    try:
        row.encode()
    # JSON may spell half a character as an escape: "\ud83d"
    except UnicodeEncodeError as error:
        found = f"half a surrogate pair ({row[error.start]!r})"
        raise RowProblem(
            "text that is valid Unicode", found, "replace or remove that character"
        ) from None
    if len(row) > ROW_LARGEST:
        wanted, found = f"rows of at most {ROW_LARGEST:,} characters", f"{len(row):,}"
        raise RowProblem(wanted, found, "split it or leave it out")
    return row, notes


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
