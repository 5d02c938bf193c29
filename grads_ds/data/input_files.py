"""One thing to read, and its text line by line, unpacked and decoded.

Reads files packed by gzip, bzip2, xz or zstd as well; writes nothing. What cannot be read is added
to the problems with its file and line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from grads_ds.data.problems import Problems
from grads_ds.run_dir.storage import raise_if_storage

CHUNK = 2**20  # packed bytes read at a time


@dataclass(frozen=True)
class Input:
    """One thing to read: a file (`kind` is its suffix), a saved data set folder ("saved") or a hub
    data set ("hub").
    """

    kind: str
    path: str
    source: str


class _Zstd(io.RawIOBase):
    """The bytes of a zstd file, frame after frame. Raises EOFError where it ends inside a frame,
    which the library's own reader takes for the end of the data.
    """

    def __init__(self, path: str):
        self._file = open(path, "rb")  # noqa: SIM115 (closed in close)
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame and self._frame.eof else b""
            packed = packed or self._file.read(CHUNK)
            if not packed:
                if self._frame and not self._frame.eof:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(packed)
        part, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


PACKED: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: io.BufferedReader(_Zstd(path), CHUNK),
}


def open_packed(path: str) -> IO[bytes]:
    """The file's bytes, unpacked where its ending says that it is packed."""
    opener: Any = PACKED.get(Path(path).suffix.lower(), open)
    return cast("IO[bytes]", opener(path, "rb"))


LINE_LARGEST = 64 * 2**20  # bytes; the longest real documents have a few


def lines(item: Input, problems: Problems) -> Iterator[tuple[int, str]]:
    """Decoded lines; split at newlines alone (str.splitlines would also split at U+2028, which JSON
    strings may hold).
    """
    try:
        with open_packed(item.path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LARGEST + 1), b""), 1):
                if len(line) > LINE_LARGEST:
                    wanted, found = f"lines of at most {LINE_LARGEST:,} bytes", "a longer one"
                    problems.add(f"{item.path}:{number}", wanted, found, "split it or leave it out")
                    return
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                    problems.add(
                        f"{item.path}:{number}", "UTF-8 text", where, "save the file as UTF-8"
                    )
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as error:
        raise_if_storage(error)
        reason = str(error) or type(error).__name__
        problems.add(item.path, "a readable file", reason, "replace it")
