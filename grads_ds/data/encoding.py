"""One block of rows: parsed, checked and tokenised, in this process or another; the result is a
part, on disk.

A part is an Arrow stream of the kept rows and, beside it, the record of what became of every row.
Both depend on the block and the config alone: not on the process, nor on the blocks it had before.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.data.blocks import Block, Unclean
from grads_ds.data.formats import Sample
from grads_ds.data.leaks import Known, prints_of
from grads_ds.data.model_limits import model_limits
from grads_ds.data.problems import RowProblem
from grads_ds.data.row_text import NO_NUMBERS
from grads_ds.data.template import SECONDS, EndlessTemplateError
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoded, Encoder, num_target_tokens
from grads_ds.run_dir.digests import sha256
from grads_ds.run_dir.publish import atomic_path, publish_text

CHUNK = 512  # rows tokenised and written at a time
COLUMNS = ("input_ids", "labels", "sample_hash", "source", "origin", "row", "metadata")
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [(name, _IDS if name in ("input_ids", "labels") else pa.string()) for name in COLUMNS]
    # what is compared between sets: a hash of the tokens, hashes of the answers' word 8-grams
    + [("print", pa.uint64()), ("grams", pa.list_(pa.uint64()))]
)


def canonical_hash(row: dict[str, Any]) -> str:
    """32 hex digits of the row's content, whatever the order of its keys."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class Outcome:
    """What became of a block's rows.

    unclean: something is wrong with its source, and the rest says nothing. problems: of rows that
    cannot be tokenised. counts: by name. sources: of the same, by source and name.
    """

    unclean: bool = False
    problems: list[tuple[str, str, str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    answer_ends: Counter[str] = field(default_factory=Counter)
    source: str = ""
    digest: str = ""  # sha256 of the part's rows

    def text(self) -> str:
        """As JSON; equal outcomes have equal texts."""
        return json.dumps(vars(self), sort_keys=True, indent=1) + "\n"

    @classmethod
    def of(cls, text: str) -> Outcome:
        """The outcome of such a text. Raises ValueError, TypeError."""
        values = json.loads(text)
        counters = ("counts", "dropped", "left_out", "notes", "answer_ends")
        return cls(**values | {name: Counter(values[name]) for name in counters})


class _Worker:
    def __init__(self, config: Config, tokenizer: Any):
        data = config.data
        self.encoder = Encoder(tokenizer, data.max_length, data.overlong, data.dropped_content)
        self.limits = model_limits(config.model)
        self.metadata = data.metadata


_worker: _Worker | None = None  # each process's own


def start_worker(config: Config) -> None:
    """Make this process, one of several, a worker."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    set_worker(config, load_tokenizer(config.model))
    gc.freeze()  # modules and tokenizer stay: the collector need not look at them again


def set_worker(config: Config, tokenizer: Any) -> None:
    """Make this process a worker."""
    global _worker
    _worker = _Worker(config, tokenizer)


def check(block: Block) -> Outcome:
    """Parse and check the rows alone."""
    try:
        rows = sum(1 for _ in block.samples())
    except Unclean:
        return Outcome(unclean=True)
    return Outcome(counts=Counter(read=rows))


def make_part(block: Block, file: Path, known_file: Path | None) -> Outcome:
    """Parse, check and tokenise the rows; publish the part at `file` and its record beside it,
    unless something is wrong with a row.

    known_file: where it stands what the sets before this one hold (`Known`), of which alone the
    prints are kept; None keeps all.
    """
    known = None if known_file is None else Known.read(known_file)
    assert _worker is not None
    _worker.encoder.renderer.forget()
    outcome, batches = Outcome(source=block.item.source), []
    samples = block.samples()
    try:
        # few rows at a time are Python objects: the garbage collector goes through all there are
        while rows := list(islice(samples, CHUNK)):
            columns = _encode(rows, bool(block.rows), outcome, known)
            batches.append(pa.RecordBatch.from_pydict(columns, SCHEMA))
            outcome.counts["read"] += len(rows)
    except Unclean:
        return Outcome(unclean=True)
    if outcome.problems:
        return outcome
    with atomic_path(file) as aside:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
            for batch in batches:
                stream.write_batch(batch)
        outcome.digest = sha256(aside)
    publish_text(record_of(file), outcome.text())
    return outcome


def record_of(file: Path) -> Path:
    """Where the record of a part lies."""
    return file.with_suffix(".json")


def read_outcome(file: Path) -> Outcome | None:
    """The outcome of a part that is whole on disk; None where there is none, or a damaged one."""
    try:
        outcome = Outcome.of(record_of(file).read_text())
        return outcome if outcome.digest == sha256(file) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _encode(
    rows: Sequence[tuple[Sample, str, tuple[str, ...]]],
    of_table: bool,
    outcome: Outcome,
    known: Known | None,
) -> dict[str, list[Any]]:
    """The columns of the rows that are kept; what became of each is added to `outcome`. Rows that
    are not `of_table` were parsed from JSON.
    """
    assert _worker is not None
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    given = [_as_json(sample) if of_table else sample for sample, _, _ in rows]
    try:
        results = _worker.encoder.encode(given)
    except EndlessTemplateError:
        raise UserError(
            problem(
                "model.chat_template",
                f"a template that renders every row within {SECONDS:g} s",
                f"one that did not, at most {len(given)} rows after {given[0].origin}",
                "simplify its loops",
            )
        ) from None
    for sample, (_, text, notes), encoded in zip(given, rows, results, strict=True):
        encoded = _within_vocabulary(encoded)
        if isinstance(encoded, RowProblem):
            said = (encoded.wanted, encoded.found, encoded.change)
            outcome.problems.append((sample.origin, *said))
            continue
        _count(outcome, encoded, notes)
        if encoded.dropped:
            continue
        plain = not of_table and NO_NUMBERS not in notes
        row = sample.row if plain else json.loads(text)
        asked = {name: row.get(name) for name in _worker.metadata}
        values = (
            encoded.input_ids,
            encoded.labels,
            canonical_hash(row),
            sample.source,
            sample.origin,
            text,
            json.dumps(asked, ensure_ascii=False, sort_keys=True),
            *prints_of(encoded.input_ids, sample, known),
        )
        for name, value in zip(SCHEMA.names, values, strict=True):
            columns[name].append(value)
    return columns


def _as_json(sample: Sample) -> Sample:
    """A table's sample as if it had been read from JSON: times, bytes and the like as text."""
    said = json.loads(json.dumps([sample.messages, sample.text, sample.tools], default=str))
    messages, text, tools = said
    return Sample(sample.source, sample.origin, {}, messages, text, tools, sample.context)


def _within_vocabulary(encoded: Encoded | RowProblem) -> Encoded | RowProblem:
    assert _worker is not None
    rows = _worker.limits.rows
    if isinstance(encoded, RowProblem) or not rows or max(encoded.input_ids, default=0) < rows:
        return encoded
    return RowProblem(
        f"token ids below the {rows:,} rows of the model's embedding",
        f"{max(encoded.input_ids)}",
        "resize the model's embedding, or use the model's own tokenizer",
    )


def _count(outcome: Outcome, encoded: Encoded, notes: Sequence[str]) -> None:
    assert _worker is not None
    counts, positions = outcome.counts, _worker.limits.positions
    counts["truncated"] += int(encoded.cut > 0)
    counts["tokens_cut"] += encoded.cut
    if encoded.dropped:
        outcome.dropped[encoded.dropped] += 1
        return
    counts["kept"] += 1
    counts["num_tokens"] += len(encoded.input_ids)
    counts["num_target_tokens"] += num_target_tokens(encoded.labels)
    counts["beyond"] += int(positions is not None and len(encoded.input_ids) > positions)
    outcome.left_out.update(encoded.left_out)
    outcome.notes.update(encoded.notes)
    outcome.notes.update(notes)
    outcome.answer_ends.update(map(str, encoded.ends))
