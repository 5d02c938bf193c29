"""What the user's rows are: formats, sources, lengths in tokens, fields to group a report by.

Reads the data files once and keeps the rows in a spool file; writes nothing else. Rows that
`prepare` would refuse are counted with their reasons and left out. At most SAMPLED rows of a larger
pool are tokenised, drawn by their content and the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.errors import UserError, problem
from grads_ds.config.model_and_data import DATA_FORMATS
from grads_ds.data.formats import Sample, detect, load_samples
from grads_ds.data.messages import FIELDS
from grads_ds.data.problems import SHOWN, Problems, RowProblem
from grads_ds.data.sources import find_inputs
from grads_ds.data.spool import read_sample, spool_samples
from grads_ds.data.tokens import Encoder

SAMPLED = 20_000  # rows tokenised at most; the other rows are read and checked alone
_REFUSED = 0.2  # share of refused rows from which the files are taken to be misunderstood
_VALUES = 40  # distinct values up to which a field groups the rows
_CHUNK = 512
_DOCUMENT, _PIECE = 20_000, 2_000  # characters: plain text above is cut into pieces of whole lines
_NO_LIMIT = 2**31
_PIECES = "cut out of a longer text"
_NO_GROUPS = FIELDS | {"id"}  # fields that say nothing of where a row belongs


@dataclass
class Rows:
    """The rows of a pool, in the order read.

    `keys` uint64 [N] are of what the row says and the seed: equal for equal rows, otherwise at
    random. `sources` holds each row's source, `lengths` and `first_targets` int64 [N] tokens of a
    row and the place of its first target, -1 where the row was not tokenised, 0 tokens where it has
    none to learn.
    """

    spool: Path
    keys: np.ndarray
    sources: list[str]
    formats: dict[str, str]
    fields: dict[str, int]
    refused: Problems
    pieces: int  # rows that were cut out of longer texts
    lengths: np.ndarray
    first_targets: np.ndarray
    left_out: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)
    bad: set[int] = field(default_factory=set)  # rows that the chat template refuses

    def usable(self, max_length: int) -> np.ndarray:
        """Of the tokenised rows those with a target within `max_length` tokens, bool [N]."""
        return (self.lengths > 0) & (self.first_targets < max_length)


def read_rows(entries: Sequence[str], spool: Path, seed: int, style: str = "auto") -> Rows:
    """Read every row of `entries` into `spool`.

    Raises UserError where a file is not there, no row can be used, or so many rows are refused that
    the files have to be looked at first.
    """
    missing, refused, unwritable = Problems(), Problems(), Problems()
    find_inputs(entries, missing)
    missing.raise_if_any()
    samples = _in_pieces(load_samples(entries, style, refused))
    number = spool_samples(samples, spool, unwritable)
    unwritable.raise_if_any()
    share = refused.count / max(1, number + refused.count)
    if share > _REFUSED or not number:
        found = f"{number:,} of {number + refused.count:,}" if number else "none"
        last = problem("DATA", "rows that can be used", found, "correct the files")
        raise UserError([*refused.shown, *_more(refused), last])
    keys, sources, formats = np.zeros(number, np.uint64), [], {}
    values: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    pieces = 0
    for i, (sample, text) in enumerate(spooled(spool)):
        row = json.loads(text)
        keys[i] = _key(sample, seed)
        pieces += _PIECES in sample.notes
        sources.append(sample.source)
        if sample.source not in formats:
            formats[sample.source] = style if style != "auto" else detect(row) or style
        _note_fields(row, values, counts)
    fields = {
        name: len(found)
        for name, found in values.items()
        if 1 < len(found) <= _VALUES and counts[name] > number // 2 and 3 * len(found) <= number
    }
    unknown = np.full(number, -1, np.int64)
    return Rows(spool, keys, sources, formats, fields, refused, pieces, unknown, unknown.copy())


def spooled(spool: Path) -> Iterator[tuple[Sample, str]]:
    """(sample, row as JSON) of every spooled row, in order."""
    with spool.open(encoding="utf-8") as file:
        for line in file:
            yield read_sample(line)


def tokenise(rows: Rows, tokenizer: Any, wanted: np.ndarray) -> None:
    """Fill in the lengths of the rows where `wanted` bool [N] is true. Rows that the chat template
    refuses go to `rows.bad` and are counted as refused.
    """
    encoder = Encoder(tokenizer, _NO_LIMIT, "truncate", "count")
    chosen = ((i, sample) for i, (sample, _) in enumerate(spooled(rows.spool)) if wanted[i])
    while chunk := list(islice(chosen, _CHUNK)):
        for (i, sample), found in zip(
            chunk, encoder.encode([sample for _, sample in chunk]), strict=True
        ):
            if isinstance(found, RowProblem):
                rows.refused.add(sample.origin, found.wanted, found.found, found.change)
                rows.bad.add(i)
            elif found.dropped:
                rows.unusable[found.dropped] += 1
                rows.lengths[i] = rows.first_targets[i] = 0
            else:
                rows.left_out.update(found.left_out)
                rows.lengths[i] = len(found.input_ids)
                targets = np.flatnonzero(np.asarray(found.labels[1:]) >= 0)
                rows.first_targets[i] = 1 + targets[0]


def sampled(rows: Rows) -> np.ndarray:
    """The rows to tokenise, bool [N]: all, or the SAMPLED of smallest key."""
    wanted = np.zeros(len(rows.keys), bool)
    wanted[np.argsort(rows.keys, kind="stable")[:SAMPLED]] = True
    return wanted


def format_words(rows: Rows) -> list[str]:
    """One line for each source: its rows, its format and what such rows look like."""
    counts = Counter(rows.sources)
    return [
        f"{source}: {counts[source]:,} rows of format {style}: {DATA_FORMATS[style]}"
        for source, style in rows.formats.items()
    ]


def _in_pieces(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The samples, with plain texts above _DOCUMENT characters cut at line ends into pieces of up
    to _PIECE characters: a whole document would be one row, and most of it beyond any max_length.
    """
    for sample in samples:
        if sample.text is None or sample.context or len(sample.text) <= _DOCUMENT:
            yield sample
            continue
        piece = ""
        for line in [*sample.text.splitlines(keepends=True), None]:
            if piece.strip() and (line is None or len(piece) + len(line) > _PIECE):
                text = piece.rstrip("\n")
                row, notes = sample.row | {"text": text}, (*sample.notes, _PIECES)
                yield replace(sample, row=row, text=text, notes=notes)
                piece = ""
            piece += line or ""


def _more(refused: Problems) -> list[str]:
    left = refused.count - min(SHOWN, len(refused.shown))
    return [f"... and {left:,} more"] if left else []


def _key(sample: Sample, seed: int) -> int:
    said = json.dumps([seed, sample.messages, sample.text, sample.tools, sample.context])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def _note_fields(row: dict[str, Any], values: dict[str, set[str]], counts: Counter[str]) -> None:
    """Count the rows with a short plain value in a field that no format reads."""
    for name, value in row.items():
        if name in _NO_GROUPS or not isinstance(value, (str, int, bool)) or value == "":
            continue
        counts[name] += 1
        found = values.setdefault(name, set())
        if len(found) <= _VALUES:
            found.add(str(value)[:200])
