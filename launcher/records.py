"""The small JSON files by which a launcher and its ranks' supervisors talk: each is replaced as a
whole, and read at any time.

Standard library only: every rank's supervisor imports it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

UNSEEN = "does not see the job folder"  # said through the runner, the only way that is left then


def publish(path: Path, value: dict[str, Any]) -> None:
    """Replace a small JSON file as a whole; on a full disk write into the space that the file has
    already, if it is there.
    """
    text = json.dumps(value)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        with open(path, "r+") as file:  # who reads half of it reads again
            file.write(text.ljust(os.fstat(file.fileno()).st_size))


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is absent or half there."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
    return {}
