"""Which failures are the file system's, and with which exit status they are told.

Standard library only.
"""

from __future__ import annotations

import errno
import re

from grads_ds.config.errors import WRONG_PATH

DISK_FULL, STORAGE = 7, 8  # exit statuses
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILED = (
    errno.EIO,
    errno.ESTALE,
    errno.EROFS,
    errno.EUCLEAN,
    errno.EREMOTEIO,
    errno.ENOLCK,
    errno.ENXIO,
    errno.ENODEV,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
)
# libraries in C++ and Rust tell the system's error in words alone
_FULL_WORDS = re.compile(r"No space left on device|[Dd]isk quota exceeded|os error (28|122|27)\b")
_WORDS = re.compile(
    r"Input/output error|Stale file handle|Read-only file system|os error (5|116|30)\b"
    r"|code: (5|116|30)\b|PytorchStreamWriter failed|CRC checksum verification failed"
)
_FULL_CODES = re.compile(r"code: (28|122|27)\b")


def storage_status(error: BaseException) -> int | None:
    """DISK_FULL or STORAGE when the error, or one that it came from, is the file system's; None
    otherwise.
    """
    seen: set[int] = set()
    chain: list[BaseException] = [error]
    found = None
    while chain:
        link = chain.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        status = _status(link)
        if status == DISK_FULL:
            return DISK_FULL
        found = found or status
        chain += [cause for cause in (link.__cause__, link.__context__) if cause is not None]
    return found


def raise_if_storage(error: BaseException) -> None:
    """Raise an error of the user's input again where it is the file system's, no wrong path."""
    if not isinstance(error, WRONG_PATH) and storage_status(error) is not None:
        raise error


def _status(error: BaseException) -> int | None:
    text = str(error)
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number in _FULL or _FULL_WORDS.search(text) or _FULL_CODES.search(text):
        return DISK_FULL
    if _WORDS.search(text):
        return STORAGE
    return STORAGE if number in _FAILED else None
