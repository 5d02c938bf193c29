"""Files and folders appear whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling (file or folder) of `path`; on success flush it to disk and rename
    it into place.

    On failure nothing is published and what stood at `path` is untouched. A folder replaces the old
    one as a whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield aside
        for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            _fsync(file)
        if aside.is_dir() and path.exists():
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            path.rename(old)
            aside.rename(path)
            _remove(old)
        else:
            aside.replace(path)
        _fsync(path.parent)
    finally:
        _remove(aside)


def publish_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text)


def publish_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is refused: it is not JSON."""
    publish_text(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def _fsync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to sync folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
