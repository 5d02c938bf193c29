"""Digests of content: do two hosts, or two moments, see the same files?

One rule for models, and for what hosts compare: files below 64 MiB are read whole, of larger ones
the size and 64 blocks of 64 KiB spread over them, since other weights differ everywhere. Rows do
not: a run's sources are read whole. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHOLE_BELOW = 64 * 2**20  # bytes; of a larger file, blocks are read
BLOCKS, BLOCK = 64, 2**16
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
DIGITS = 32
# of whole files that this process has read: a start that looks at a model twice reads it once
_seen: dict[tuple[str, int, int, int], str] = {}


def sha256(file: Path) -> str:
    """The sha256 of a whole file, 64 hex digits, as `sha256sum` prints it. Raises OSError."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256_once(file: Path) -> str:
    """`sha256`, from memory when this process has read the file and its size and times have not
    changed since. Raises OSError.
    """
    state = file.stat()
    key = (str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if key not in _seen:
        _seen[key] = sha256(file)
    return _seen[key]


def inputs_digest(inputs: Mapping[str, Any]) -> str:
    """A digest (32 hex digits) of plain values by name, whatever their order."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def file_digest(file: Path) -> str:
    """sha256 (hex, 64 digits) of a file's content under the rule above. Raises OSError."""
    size = file.stat().st_size
    if size < WHOLE_BELOW:
        return sha256_once(file)
    digest = hashlib.sha256(f"{size}:".encode())
    with file.open("rb") as content:
        for block in range(BLOCKS):
            content.seek((size - BLOCK) * block // (BLOCKS - 1))
            digest.update(content.read(BLOCK))
    return digest.hexdigest()


def content_digest(
    path: str | Path | None, weights: bool = True, whole: bool = False
) -> str | None:
    """A digest of what a file or folder holds, by relative names: the same on every host.

    Hidden files (caches, half-written ones) do not count; `weights=False` leaves weight files out,
    `whole` reads large files to their end.
    None for a hub id, nothing there, or what is no file or folder (a pipe, a device: reading it
    might never end). Raises OSError for a file that cannot be read.
    """
    if path is None or not (Path(path).is_dir() or Path(path).is_file()):
        return None
    root = Path(path)
    digest = hashlib.sha256()
    for file in sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]:
        relative = file.relative_to(root) if root.is_dir() else Path(file.name)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if weights or file.suffix not in WEIGHTS:
            content = sha256_once(file) if whole else file_digest(file)
            # a name need not be text
            digest.update(f"{relative}:{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:DIGITS]


def code_digest() -> str:
    """A digest of this package's own sources: hosts with different ones run different programs."""
    package = Path(__file__).parent.parent
    sources = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if name.endswith(".py")
    )
    digest = hashlib.sha256()
    for file in sources:
        digest.update(f"{file.relative_to(package)}:{file_digest(file)}\n".encode())
    return digest.hexdigest()[:DIGITS]
