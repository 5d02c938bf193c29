"""A failing file system is told as such, with a status of its own, however deep the error lies."""

from __future__ import annotations

import errno

import pytest

from grads_ds.run_dir.storage import DISK_FULL, STORAGE, storage_status

KINDS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EIO: STORAGE,
    errno.ESTALE: STORAGE,
    errno.EROFS: STORAGE,
    errno.ECONNREFUSED: None,
    errno.EADDRINUSE: None,
}


@pytest.mark.parametrize("number", KINDS)
def test_the_systems_number_decides(number: int) -> None:
    assert storage_status(OSError(number, "words")) == KINDS[number]


def test_an_error_that_came_from_a_full_disk_is_one() -> None:
    outer = RuntimeError("could not save")
    outer.__cause__ = ValueError("a part of it")
    outer.__cause__.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert storage_status(outer) == DISK_FULL


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", DISK_FULL),
        ('IoError(Os { code: 122, kind: Other, message: "?" })', DISK_FULL),
        ('IoError(Os { code: 5, kind: Other, message: "?" })', STORAGE),
        ("PytorchStreamWriter failed writing file data/5: file write failed", STORAGE),
        ("error code: 503 from the server", None),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_words_of_libraries_that_tell_no_number(text: str, status: int | None) -> None:
    assert storage_status(RuntimeError(text)) == status
