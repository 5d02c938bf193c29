"""How far prepare is with a set, and how long it will take: rows done, of a number that is
estimated from the bytes read.
"""

from __future__ import annotations

import os

from tqdm import tqdm

from grads_ds.data.blocks import Block
from grads_ds.data.input_files import PACKED, Input


class ReadingBar:
    """A bar on the terminal; a context manager that ends it."""

    def __init__(self, name: str, inputs: list[Input]) -> None:
        self.sizes = [_bytes(item) for item in inputs]
        self.bar = tqdm(desc=f"preparing {name}", unit=" rows")
        self.rows_read = self.rows_done = self.bytes_before = self.bytes_here = self.place = 0

    def __enter__(self) -> ReadingBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def read(self, block: Block) -> None:
        """A block was read from its source."""
        self.rows_read += block.size
        if block.lines and not _packed(block.item):
            self.bytes_here += sum(map(len, block.lines))

    def end(self, item: Input) -> None:
        """The source at hand is read to its end."""
        self.bytes_before += self.sizes[self.place] or 0
        self.bytes_here, self.place = 0, self.place + 1

    def done(self, rows: int) -> None:
        """A block of `rows` rows is done."""
        self.rows_done += rows
        read = self.bytes_before + self.bytes_here
        known = None not in self.sizes and read > 0
        whole = sum(size or 0 for size in self.sizes)
        self.bar.total = (
            max(self.rows_done, round(self.rows_read * whole / read)) if known else None
        )
        self.bar.update(rows)


def _packed(item: Input) -> bool:
    return os.path.splitext(item.path)[1].lower() in PACKED


def _bytes(item: Input) -> int | None:
    """A file's size; None of what is no file."""
    try:
        return os.path.getsize(item.path) if os.path.isfile(item.path) else None
    except OSError:
        return None
