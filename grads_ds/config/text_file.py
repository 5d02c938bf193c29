"""The text of a file that a user names: UTF-8, or refused with the place of a wrong byte."""

from __future__ import annotations

from pathlib import Path

from grads_ds.config.errors import WRONG_PATH, UserError, problem


def text_of(path: Path, where: str, wanted: str) -> str:
    """The text of `path`, `wanted` in words for key or file `where`.

    Raises UserError where there is no such file or it is not UTF-8, OSError where the file system
    fails.
    """
    try:
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
