"""Rows tokenised a chunk at a time, in this process or in several.

A chunk's lines come from `spool`; the columns go to `prepared`, with what is to be counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.data.leaks import Prints
from grads_ds.data.model_limits import model_limits
from grads_ds.data.problems import RowProblem
from grads_ds.data.spool import read_sample
from grads_ds.data.template import SECONDS, EndlessTemplateError
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoder

COLUMNS = ("input_ids", "labels", "sample_hash", "source", "origin", "row", "metadata")


def canonical_hash(row: dict[str, Any]) -> str:
    """32 hex digits of the row's content, whatever the order of its keys."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compares(config: Config) -> bool:
    """Whether there are sets whose rows must not be in the pool."""
    return bool(config.data.validation or config.anchor_sources())


@dataclass
class Chunk:
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    # source, reason dropped or "", tokens cut
    outcomes: list[tuple[str, str, int]] = field(default_factory=list)
    problems: list[tuple[str, str, str, str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    beyond: int = 0  # rows longer than the model has positions
    prints: Prints = field(default_factory=Prints)


class _Worker:
    def __init__(self, config: Config, tokenizer: Any):
        data = config.data
        self.encoder = Encoder(tokenizer, data.max_length, data.overlong, data.dropped_content)
        self.limits = model_limits(config.model)
        self.metadata = data.metadata
        self.compared = compares(config)


_worker: _Worker | None = None  # each process's own


def start_worker(config: Config) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = _Worker(config, load_tokenizer(config.model))


def work(lines: Sequence[str]) -> Chunk:
    assert _worker is not None
    chunk, given = Chunk(), [read_sample(line) for line in lines]
    rows, positions = _worker.limits.rows, _worker.limits.positions
    try:
        results = _worker.encoder.encode([sample for sample, _ in given])
    except EndlessTemplateError:
        first = given[0][0].origin
        raise UserError(
            problem(
                "model.chat_template",
                f"a template that renders every row within {SECONDS:g} s",
                f"one that did not, at most {len(given)} rows after {first}",
                "simplify its loops",
            )
        ) from None
    for (sample, text), encoded in zip(given, results, strict=True):
        if (
            not isinstance(encoded, RowProblem)
            and rows
            and max(encoded.input_ids, default=0) >= rows
        ):
            encoded = RowProblem(
                f"token ids below the {rows:,} rows of the model's embedding",
                f"{max(encoded.input_ids)}",
                "resize the model's embedding, or use the model's own tokenizer",
            )
        if isinstance(encoded, RowProblem):
            chunk.problems.append((sample.origin, encoded.wanted, encoded.found, encoded.change))
            continue
        chunk.outcomes.append((sample.source, encoded.dropped or "", encoded.cut))
        if encoded.dropped:
            continue
        chunk.beyond += positions is not None and len(encoded.input_ids) > positions
        chunk.left_out.update(encoded.left_out)
        chunk.notes.update(encoded.notes)
        chunk.notes.update(sample.notes)
        chunk.ends.update(map(str, encoded.ends))
        if _worker.compared:
            chunk.prints.add(encoded.input_ids, sample)
        row = json.loads(text)
        asked = {name: row.get(name) for name in _worker.metadata}
        metadata = json.dumps(asked, ensure_ascii=False, sort_keys=True)
        values = (
            encoded.input_ids,
            encoded.labels,
            canonical_hash(row),
            sample.source,
            sample.origin,
            text,
            metadata,
        )
        for name, value in zip(COLUMNS, values, strict=True):
            chunk.columns[name].append(value)
    return chunk


def set_worker(config: Config, tokenizer: Any) -> None:
    """Make this process a worker."""
    global _worker
    _worker = _Worker(config, tokenizer)
