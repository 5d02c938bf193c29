"""The text of a file that a user names: a regular file in UTF-8 of a bounded size, or refused with
the place of a wrong byte.
"""

from __future__ import annotations

import stat
from pathlib import Path

from grads_ds.config.errors import WRONG_PATH, UserError, problem

LARGEST = 64 * 2**20  # bytes; a configuration, a hostfile or a template has a few thousand


def text_of(path: Path, where: str, wanted: str) -> str:
    """The text of `path`, `wanted` in words for key or file `where`.

    Raises UserError where there is no such file, it is a pipe or a device (which may never end),
    larger than LARGEST, or not UTF-8; OSError where the file system fails.
    """
    try:
        state = path.stat()
        if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):
            found = f"{path}: a pipe, a socket or a device"
            raise UserError(problem(where, wanted, found, "save it to a file first"))
        if state.st_size > LARGEST:
            found = f"{path} with {state.st_size:,}"
            raise UserError(
                problem(where, f"{wanted} of at most {LARGEST:,} bytes", found, "give another file")
            )
        content = path.read_bytes()
    except WRONG_PATH as error:
        found = f"{path}: {error.strerror or error}"
        raise UserError(problem(where, wanted, found, "give an existing file")) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"byte {content[error.start]:#04x} in {path}:{line}"
        fix = "save the file as UTF-8"
        raise UserError(problem(where, f"{wanted} in UTF-8", found, fix)) from None
