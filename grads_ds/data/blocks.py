"""A source cut into blocks of rows, each the work of one process, the same whoever does it.

Of JSON lines the lines themselves are handed on, to be parsed where they are tokenised; of every
other kind the rows. Whatever is wrong with a source makes it `Unclean`: its problems are found by
reading it once more, alone and in order (`check_source`). Writes nothing.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import zstandard

from grads_ds.data.formats import Sample, check_format, detect, normalise, samples_of
from grads_ds.data.input_files import LINE_LARGEST, Input, open_packed
from grads_ds.data.problems import Problems, RowProblem
from grads_ds.data.row_text import row_text
from grads_ds.data.sources import RawRow, read
from grads_ds.data.strict_json import loads

BLOCK_ROWS = 8192
BLOCK_BYTES = 16 * 2**20  # of lines; a block of long ones has fewer rows
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError, ValueError)


class Unclean(Exception):
    """There is something wrong with a source."""


@dataclass(frozen=True)
class Block:
    """Some neighbouring rows of a source, all of format `style`.

    first: the number of the first of `lines`, from 1. rows: origin and row each, where the source
    is not made of JSON lines.
    """

    item: Input
    style: str
    forced: bool
    first: int
    lines: tuple[bytes, ...] = ()
    rows: tuple[tuple[str, Any], ...] = ()

    @property
    def size(self) -> int:
        """Number of its rows (of lines, blank ones included)."""
        return len(self.lines) or len(self.rows)

    def samples(self) -> Iterator[tuple[Sample, str, tuple[str, ...]]]:
        """Each row's sample, its JSON and its notes. Raises Unclean."""
        try:
            for origin, row in self.rows or self._parsed():
                check_format(row, self.style, self.forced)
                sample = normalise(
                    RawRow(self.item.source, origin, self.item.path, row), self.style
                )
                yield (sample, *row_text(sample))
        except (RowProblem, ValueError) as error:
            raise Unclean from error

    def _parsed(self) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(self.lines, self.first):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                row = loads(text)
                if not isinstance(row, dict):
                    raise Unclean
                yield f"{self.item.path}:{number}", row


def blocks_of(item: Input, style: str, problems: Problems) -> Iterator[Block]:
    """The blocks of a source in order. Raises Unclean.

    style: as in the config; "auto" takes the format of the source's first row. problems: is given
    the reader's notes.
    """
    if item.kind in (".jsonl", ".ndjson") and (first := _first_row(item)) is not None:
        yield from _blocks_of_lines(item, _chosen(first, style), style != "auto")
        return
    before, found = problems.count, iter(read(item, problems))
    chosen = None
    while raws := list(islice(found, BLOCK_ROWS)):
        chosen = chosen or _chosen(raws[0].row, style)
        rows = tuple((raw.origin, raw.row) for raw in raws)
        yield Block(item, chosen, style != "auto", 1, rows=rows)
    if problems.count > before:
        raise Unclean


def check_source(item: Input, style: str, problems: Problems) -> None:
    """Read a source alone, in order, and collect everything that is wrong with it."""
    for sample in samples_of(item, style, problems):
        try:
            row_text(sample)
        except RowProblem as problem:
            problems.add(sample.origin, problem.wanted, problem.found, problem.change)


def _chosen(row: dict[str, Any], style: str) -> str:
    chosen = detect(row) if style == "auto" else style
    if chosen is None:
        raise Unclean
    return chosen


def _first_row(item: Input) -> dict[str, Any] | None:
    """The first row of a file of JSON lines; None where it is an array under that name."""
    try:
        with open_packed(item.path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LARGEST + 1), b""), 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if number == 1 and text.lstrip().startswith("["):
                    return None
                if text.strip():
                    row = loads(text)
                    if not isinstance(row, dict):
                        raise Unclean
                    return row
    except _UNREADABLE as error:
        raise Unclean from error
    raise Unclean


def _blocks_of_lines(item: Input, style: str, forced: bool) -> Iterator[Block]:
    first = 1
    try:
        with open_packed(item.path) as file:
            while lines := tuple(_some_lines(file)):
                yield Block(item, style, forced, first, lines)
                first += len(lines)
    except _UNREADABLE as error:
        raise Unclean from error


def _some_lines(file: IO[bytes]) -> Iterator[bytes]:
    size = 0
    for _ in range(BLOCK_ROWS):
        line = file.readline(LINE_LARGEST + 1)
        if not line:
            return
        if len(line) > LINE_LARGEST:
            raise Unclean
        yield line
        size += len(line)
        if size >= BLOCK_BYTES:
            return
