"""Samples aside in a file, one JSON line each, so that memory does not grow with the pool.

Written while the user's files are read and checked, read again when they are tokenised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grads_ds.data.formats import Sample
from grads_ds.data.problems import Problems

ROW_LARGEST = 64 * 2**20  # characters of a row as JSON
NO_NUMBERS = "rows with NaN or Infinity, written as null"


def spool_samples(samples: Iterable[Sample], spool: Path, problems: Problems) -> int:
    """Write the samples to `spool` until the first problem (reading on, so that all problems are
    found); the number read.
    """
    rows = 0
    with spool.open("w", encoding="utf-8") as file:
        for sample in samples:
            rows += 1
            notes = list(sample.notes)
            try:
                row = _json(sample.row)
            except ValueError:
                row = _json(_without_nan(sample.row))
                notes.append(NO_NUMBERS)
            try:
                row.encode()
            # JSON may spell half a character as an escape: "\ud83d"
            except UnicodeEncodeError as error:
                found = f"half a surrogate pair ({row[error.start]!r})"
                problems.add(
                    sample.origin,
                    "text that is valid Unicode",
                    found,
                    "replace or remove that character",
                )
            if len(row) > ROW_LARGEST:
                wanted, found = f"rows of at most {ROW_LARGEST:,} characters", f"{len(row):,}"
                problems.add(sample.origin, wanted, found, "split it or leave it out")
            if not problems.count:
                line = [
                    sample.source,
                    sample.origin,
                    row,
                    sample.messages,
                    sample.text,
                    sample.tools,
                    sample.context,
                    notes,
                ]
                file.write(json.dumps(line, default=str) + "\n")
    return rows


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_sample(line: str) -> tuple[Sample, str]:
    """(the sample of a spooled line, without its row; the row as JSON)."""
    source, origin, row, messages, text, tools, context, notes = json.loads(line)
    return Sample(source, origin, {}, messages, text, tools, context, tuple(notes)), row
