"""A failing file system is told as such, with a status of its own, however deep the error lies."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from grads_ds.config.deepspeed_file import read_deepspeed
from grads_ds.config.load import load_config
from grads_ds.data.input_files import Input, lines
from grads_ds.data.prepared import trained_ends
from grads_ds.data.problems import Problems
from grads_ds.report.run_logs import read_json
from grads_ds.run_dir.storage import DISK_FULL, STORAGE, raise_if_storage, storage_status

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


def test_an_input_that_cannot_be_read_is_the_file_systems_unless_its_path_is_wrong() -> None:
    for number in (errno.EIO, errno.ESTALE):
        with pytest.raises(OSError, match="words"):
            raise_if_storage(OSError(number, "words"))
    for error in (OSError(errno.ENOENT, "gone"), OSError("no gzip file"), ValueError("no text")):
        raise_if_storage(error)  # told as a problem of the input


READS = {
    "a source": lambda file: list(lines(Input(".jsonl", str(file), str(file)), Problems())),
    "the config": load_config,
    "the DeepSpeed file": lambda file: read_deepspeed(str(file)),
    "a result of the run": read_json,
    "the ends of the answers": lambda file: trained_ends(file.parents[1]),
}


@pytest.mark.parametrize("what", READS)
def test_what_cannot_be_read_is_neither_absent_nor_wrong(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prepared/prepared.json"
    file.parent.mkdir()
    file.write_text("{}")

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    for place in ("io.open", "builtins.open"):
        monkeypatch.setattr(place, stale)
    with pytest.raises(OSError, match="Stale file handle"):
        READS[what](file)
