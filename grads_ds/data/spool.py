"""Samples aside in a file, one JSON line each, so that memory does not grow with the pool.

Written while `grads-ds init` reads the user's files, read again when it tries a template on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from grads_ds.data.formats import Sample
from grads_ds.data.problems import Problems, RowProblem
from grads_ds.data.row_text import row_text


def spool_samples(samples: Iterable[Sample], spool: Path, problems: Problems) -> int:
    """Write the samples to `spool` until the first problem (reading on, so that all problems are
    found); the number read.
    """
    rows = 0
    with spool.open("w", encoding="utf-8") as file:
        for sample in samples:
            rows += 1
            try:
                row, notes = row_text(sample)
            except RowProblem as problem:
                problems.add(sample.origin, problem.wanted, problem.found, problem.change)
                continue
            if not problems.count:
                said = [sample.messages, sample.text, sample.tools, sample.context, notes]
                line = [sample.source, sample.origin, row, *said]
                file.write(json.dumps(line, default=str) + "\n")
    return rows


def read_sample(line: str) -> tuple[Sample, str]:
    """(the sample of a spooled line, without its row; the row as JSON)."""
    source, origin, row, messages, text, tools, context, notes = json.loads(line)
    return Sample(source, origin, {}, messages, text, tools, context, tuple(notes)), row
