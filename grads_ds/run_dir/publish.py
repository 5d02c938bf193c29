"""Files and folders appear whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError, problem

_ASIDE = r"\.(\d+\.)?[0-9a-f]{8}\.(tmp|old)"  # how the names below end


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling (file or folder) of `path`; on success flush it to disk and rename
    it into place.

    On failure nothing is published and what stood at `path` is untouched. A folder replaces the old
    one as a whole. Raises UserError where a file would have to replace a folder, or a folder to be
    made in a file.
    """
    make_folder(path.parent)
    aside = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield aside
        sync_tree(aside)
        if aside.is_dir() and path.exists():
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            path.rename(old)
            try:
                aside.rename(path)
            except OSError:
                old.rename(path)
                raise
            _remove(old)
        else:
            refuse_folders(path)
            aside.replace(path)
        sync(path.parent)
    finally:
        _remove(aside)


@contextlib.contextmanager
def atomic_files(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty temporary folder; on success its files replace those of the same names in
    `folder`, and `folder`'s other files stay.

    Several files cannot be renamed at once. The one named `last` is the mark of the whole: it goes
    first and comes back after all others, so that a set which was cut short has none. On failure
    before that nothing is touched. Raises UserError as `atomic_path` does.
    """
    make_folder(folder)
    aside = folder / f".{last}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        aside.mkdir()
        yield aside
        sync_tree(aside)
        refuse_folders(*(folder / file.name for file in aside.iterdir()))
        (folder / last).unlink(missing_ok=True)
        sync(folder)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == last):
            file.replace(folder / file.name)
        sync(folder)
    finally:
        _remove(aside)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises UserError where a file stands in the place of one,
    OSError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        files = (place for place in (folder, *folder.parents) if place.exists())
        raise UserError(
            problem(str(next(files)), "a folder, or nothing there", "a file", "move it away")
        ) from None


def refuse_folders(*paths: Path) -> None:
    """Raise UserError for folders in the place of files that a run writes: none is removed."""
    found = [
        problem(str(path), "a file, or nothing there", "a folder", "move it away")
        for path in paths
        if path.is_dir()
    ]
    if found:
        raise UserError(found)


def publish_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text)


def publish_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically. NaN is refused: it is not JSON."""
    publish_text(path, json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def sweep(path: Path) -> None:
    """Remove what killed processes left of earlier attempts to publish `path`, or files in it."""
    beside = re.compile(rf"\.{re.escape(path.name)}{_ASIDE}")
    inside = re.compile(rf"\..+{_ASIDE}")
    leftovers = [
        *(f for f in path.parent.glob(".*") if beside.fullmatch(f.name)),
        *(f for f in path.rglob(".*") if inside.fullmatch(f.name)),
    ]
    for leftover in leftovers:
        _remove(leftover)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder and all in it, to disk. Raises OSError as `sync` does."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync(file)


def sync(path: Path) -> None:
    """Flush a file or folder to disk.

    Raises OSError; not where a file system has no sync for folders.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
