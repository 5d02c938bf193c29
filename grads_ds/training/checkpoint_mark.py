"""The mark of a finished checkpoint: which ranks wrote it for which inputs, and every file's size
and sha256. No torch import.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grads_ds.distributed import heartbeat
from grads_ds.run_dir.digests import inputs_digest, sha256_once
from grads_ds.run_dir.publish import publish_json

COMPLETE = "complete"  # the file


def write_mark(folder: Path, mark: Mapping[str, Any]) -> None:
    """Mark the checkpoint as whole. `mark`: ranks, step, identity, files."""
    publish_json(folder / COMPLETE, {**mark, "mark_sha256": inputs_digest(mark)})


def read_mark(folder: Path) -> dict[str, Any] | None:
    """The mark of a checkpoint; None where it is absent or damaged. Raises OSError."""
    try:
        mark: dict[str, Any] = json.loads((folder / COMPLETE).read_bytes())
        given = mark.pop("mark_sha256")
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return mark if given == inputs_digest(mark) else None


def altered_files(folder: Path, files: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Which of the files `names` are not as the mark's `files` say."""
    found = []
    for name in names:
        path = folder / name
        heartbeat.beat(f"{folder.name}: reading it once more")
        size = path.stat().st_size if path.is_file() else -1
        if size != files[name]["size"] or sha256_once(path) != files[name]["sha256"]:
            found.append(name)
    return found
