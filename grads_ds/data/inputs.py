"""One thing to read, and its text line by line, unpacked and decoded.

Reads files packed by gzip, bzip2, xz or zstd as well; writes nothing. What cannot be read is added
to the faults with its file and line.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from grads_ds.data.faults import Faults


@dataclass(frozen=True)
class Input:
    """One thing to read: a file (`kind` is its suffix), a saved data set folder ("saved") or a hub
    data set ("hub").
    """

    kind: str
    path: str
    source: str


PACKED: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstandard.open,
}


def open_packed(path: str) -> IO[bytes]:
    """The file's bytes, unpacked where its ending says that it is packed."""
    opener: Any = PACKED.get(Path(path).suffix.lower(), open)
    return cast("IO[bytes]", opener(path, "rb"))


def lines(item: Input, faults: Faults) -> Iterator[tuple[int, str]]:
    """Decoded lines; split at newlines alone (str.splitlines would also split at U+2028, which JSON
    strings may hold).
    """
    try:
        with open_packed(item.path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                    faults.add(
                        f"{item.path}:{number}", "UTF-8 text", where, "save the file as UTF-8"
                    )
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        faults.add(item.path, "a readable file", str(error), "replace it")
