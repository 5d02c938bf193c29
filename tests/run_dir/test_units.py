"""Nothing half-written is ever published; a unit is done only while its inputs and outputs are what
they were.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from grads_ds.config.errors import UserError
from grads_ds.run_dir import units
from grads_ds.run_dir.publish import atomic_files, atomic_path, publish_json, publish_text
from grads_ds.run_dir.units import mark_done, unit_id, why_due


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "file"
    publish_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as aside:
        aside.write_text("half")
        raise RuntimeError("disk full")
    assert target.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for generation in ("one", "two"):
        with atomic_path(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / generation).write_text(generation)
    assert [f.name for f in (tmp_path / "folder").iterdir()] == ["two"]
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_json_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        publish_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_unit_is_due_when_an_input_or_output_changed(tmp_path: Path) -> None:
    inputs = {"select": {"budget": 0.05}, "probe": "abc"}
    assert why_due(tmp_path, "select/a", inputs) == "not done yet"
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("12345")
    first = mark_done(tmp_path, "select/a", inputs, ["out"], 1.0)
    assert why_due(tmp_path, "select/a", inputs) is None
    assert unit_id(tmp_path, "select/a") == first
    assert (
        why_due(tmp_path, "select/a", inputs | {"select": {"budget": 0.1}})
        == "select.budget was 0.05, now 0.1"
    )
    (tmp_path / "out/file").write_text("1234567")
    assert why_due(tmp_path, "select/a", inputs) == "out/file was altered"
    (tmp_path / "out/file").unlink()
    assert why_due(tmp_path, "select/a", inputs) == "out/file is gone"
    (tmp_path / "out/file").write_text("12345")
    assert mark_done(tmp_path, "select/a", inputs, ["out"], 1.0) != first


@pytest.mark.parametrize("thorough", [False, True])
def test_a_flipped_bit_in_an_output_makes_its_unit_due(tmp_path: Path, thorough: bool) -> None:
    """Also where size and time tell nothing, as with a disk that rots."""
    (tmp_path / "table").write_bytes(b"12345")
    mark_done(tmp_path, "probe/record", {}, ["table"], 1.0)
    times = (tmp_path / "table").stat()
    (tmp_path / "table").write_bytes(b"12344")
    os.utime(tmp_path / "table", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert why_due(tmp_path, "probe/record", {}, thorough) == "table was altered"


def test_a_large_output_is_read_whole_by_who_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "HASHED_BELOW", 3)
    (tmp_path / "model").write_bytes(b"12345")
    mark_done(tmp_path, "sft/full", {}, ["model"], 1.0)
    times = (tmp_path / "model").stat()
    (tmp_path / "model").write_bytes(b"12344")
    os.utime(tmp_path / "model", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert why_due(tmp_path, "sft/full", {}) is None  # a start that does not read it
    assert why_due(tmp_path, "sft/full", {}, thorough=True) == "model was altered"
    os.utime(tmp_path / "model")
    assert why_due(tmp_path, "sft/full", {}) == "model was altered"


def test_a_copied_run_whose_times_are_others_stays_done(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("12345")
    mark_done(tmp_path, "report", {}, ["out"], 1.0)
    os.utime(tmp_path / "out", (1, 1))
    assert why_due(tmp_path, "report", {}, thorough=True) is None


def test_a_flipped_bit_in_a_record_makes_its_unit_due(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("12345")
    mark_done(tmp_path, "report", {"budget": 5}, ["out"], 1.0)
    file = tmp_path / "state/report.json"
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        reason = why_due(tmp_path, "report", {"budget": 5})
        # blanks between the values may change without changing them
        assert reason == "its record is damaged" or json.loads(damaged) == json.loads(whole)
    assert unit_id(tmp_path, "report") is None or json.loads(damaged) == json.loads(whole)


def test_a_record_that_cannot_be_read_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(OSError, match="Input/output error"):
        why_due(tmp_path, "report", {})


def test_a_unit_that_left_an_output_out_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mark_done(tmp_path, "report", {}, ["report.html"], 1.0)
    assert unit_id(tmp_path, "report") is None


def test_a_set_of_files_cut_short_has_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("one", "two"):
        with atomic_files(tmp_path, last="mark") as aside:
            for name in ("a", "b", "mark"):
                (aside / name).write_text(text)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == dict.fromkeys("ab", "two") | {
        "mark": "two"
    }
    with pytest.raises(RuntimeError), atomic_files(tmp_path, last="mark") as aside:
        (aside / "a").write_text("three")
        raise RuntimeError
    assert {f.read_text() for f in tmp_path.iterdir()} == {"two"}
    replace = Path.replace

    def cut_short(self: Path, target: Path) -> Path:
        if target.name == "b":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut_short)
    with pytest.raises(OSError), atomic_files(tmp_path, last="mark") as aside:
        for name in ("a", "b", "mark"):
            (aside / name).write_text("four")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


def test_a_folder_in_the_place_of_a_file_is_kept_and_named(tmp_path: Path) -> None:
    """Nothing is replaced then: not the folder, and not the other files of its set."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine").touch()
    (tmp_path / "mark").write_text("one")
    with pytest.raises(UserError, match="b: wanted a file, or nothing there; found a folder"):
        publish_text(tmp_path / "b", "text")
    with pytest.raises(UserError, match="found a folder"):
        with atomic_files(tmp_path, last="mark") as aside:
            for name in ("a", "b", "mark"):
                (aside / name).write_text("two")
    with pytest.raises(UserError, match="mark: wanted a folder, or nothing there; found a file"):
        publish_text(tmp_path / "mark/deep/file", "text")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b", "mark"]
    assert (tmp_path / "b/mine").exists() and (tmp_path / "mark").read_text() == "one"


def test_a_sync_that_fails_fails_the_publication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        publish_text(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
