"""A finished run meets what is not its own: folders in the place of its files, another run's
results, a disk without room, a name that acts on a terminal. Each is told; nothing is lost.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from grads_ds.cli import main
from grads_ds.run_dir.lock import LOCK_VARIABLE
from grads_ds.run_dir.units import mark_done, read_record
from scripts.faults import small_run

Start = Callable[[Path], str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run directory that is done up to its report; what a GPU would make is made up."""
    folder = tmp_path_factory.mktemp("finished")
    config = small_run.make(folder, tiny_model)
    for name in ("prepare", "merge", "select", "report"):
        small_run.STEPS[name](config)
    tree = config.model_dump(mode="json", exclude_unset=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run"


@pytest.fixture
def start(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Copies the finished run to a folder; returns the path of a config of it."""
    monkeypatch.delenv(LOCK_VARIABLE, raising=False)

    def copied(run: Path) -> str:
        shutil.copytree(finished, run)
        tree = yaml.safe_load((finished.parent / "config.yaml").read_text())
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"run_dir": str(run)}))
        return str(tmp_path / "config.yaml")

    return copied


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


DUE = {"report": "report.html", "select": "selection/selected.jsonl"}  # without which it is due
# a file of the run -> the command that would have to read or replace it
FOLDERS = {
    "lock.json": "report",
    ".stop.json": "report",
    "resolved.yaml": "report",
    "report.html": "report",
    "state/report.json": "report",
    "state/report.owned": "report",
    "state/select.selected.owned": "select",
    "state/select.selected.json": "select",
    "selection/selection.json": "select",
    "selection/comparison.json": "select",
    "state/prepare.owned": "export",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_the_place_of_a_file_is_named_and_kept(
    name: str, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, command = tmp_path / "run", FOLDERS[name]
    config = start(run)
    (run / DUE.get(command, "report.html")).unlink()
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    (run / name / "mine").touch()
    out = ["--to", "trl", "--out", str(run / "out")] if command == "export" else []
    assert main([command, config, *out]) == 2
    said = capsys.readouterr().err
    assert f"{run / name}: wanted a file, or nothing there; found a folder" in said
    assert "Traceback" not in said and (run / name / "mine").exists()


def test_a_file_in_the_place_of_a_folder_is_named_and_kept(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = start(tmp_path / "run"), tmp_path / "run/selection"
    shutil.rmtree(folder)
    folder.write_text("mine")
    assert main(["select", config]) == 2
    said = capsys.readouterr().err
    assert f"{folder}: wanted a folder, or nothing there; found a file" in said
    assert "Traceback" not in said and folder.read_text() == "mine"


FOREIGN = {
    "altered": ["evaluation.json"],
    "sft.selected was": ["evaluation.json", "state/evaluate.json"],
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_another_runs_evaluation_is_not_reported_as_this_ones(
    reason: str, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the page, whether it is due or finished, and with its own record neither."""
    other, run = tmp_path / "other/run", tmp_path / "run"
    start(other)
    (other / "evaluation.json").write_text((other / "evaluation.json").read_text() + " ")
    evaluated = read_record(other, "evaluate")
    assert evaluated is not None
    sft = {"selected": mark_done(other, "sft/selected", {}, ["sft/model"], 0.0)}
    outputs = ["evaluation.json", "evaluation"]
    mark_done(other, "evaluate", evaluated["inputs"] | {"sft": sft}, outputs, 0.0)
    config = start(run)
    for name in FOREIGN[reason]:
        shutil.copy(other / name, run / name)
    page = (run / "report.html").read_bytes()
    assert main(["report", config]) == 2
    said = capsys.readouterr().err
    assert "wanted evaluate to be finished and up to date" in said and reason in said
    assert (run / "report.html").read_bytes() == page
    (run / "state/report.json").unlink()
    assert main(["report", config]) == 2 and (run / "report.html").read_bytes() == page


@pytest.fixture(params=["size=1m", "size=64m,nr_inodes=90"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A small file system in memory: full by its bytes, or by its number of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave neither a byte nor a file of room below `folder`."""
    folder.mkdir()
    with pytest.raises(OSError, match="No space left"):
        for number in range(1000):
            with open(folder / str(number), "wb", buffering=0) as file:
                while number == 0 and file.tell() < 2 * 2**20:
                    file.write(b"x" * 4096)


@pytest.mark.parametrize("command", ["export", "report"])
def test_a_full_disk_is_told_and_leaves_what_was_there(
    command: str, disk: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    config = start(disk / "run")
    out = ["--to", "trl", "--out", str(disk / "out")] if command == "export" else []
    (disk / "run/state/report.json").unlink()  # due, and the page of before is there
    before = listing(disk)
    fill(disk / "filler")
    assert main([command, config, *out]) == 7
    said = capsys.readouterr().err
    last = "grads-ds: no space, no inodes or no quota left where the run writes (exit status 7)"
    assert "Traceback" in said and said.rstrip().endswith(last)
    shutil.rmtree(disk / "filler")
    assert listing(disk) == before
    assert main([command, config, *out]) == 0


ODD = "run\x1b]0;owned\x07\x1b[2J\u202egpj.exe\x9b31m\x1b[8m\x1b[31m"


def test_a_name_with_escapes_acts_on_no_terminal(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the run directory, which every command says; also where colours could be shown."""
    run = tmp_path / ODD
    config = start(run)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    export = ["export", config, "--to", "trl", "--out", str(run / "out")]
    for words in (["run", config, "--from", "report"], export, ["report", config]):
        assert main(words) == 0
    for command in ("status", "check", "stop"):
        assert main([command, str(run)]) == 0
    for words in (["compare", str(run), str(run)], ["stop", str(run / "no")], export):
        assert main(words) == 2
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert main(["report", config]) == 2
    said = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e") & set(said.out + said.err)
    assert "run\\x1b]0;owned" in said.out and "run\\x1b]0;owned" in said.err
    assert "\\x1b[8m\\x1b[31m" in said.err
