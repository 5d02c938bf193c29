"""A run directory is a run's own: nothing of anybody else's is ever replaced, moved or deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.run_dir.ownership import MARKER, claim, new_folder_problems, run_dir_problems
from grads_ds.run_dir.provenance import RESOLVED, save_config
from grads_ds.run_dir.units import begin, mark_done


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name", ["prepared/notes.txt", "config.yaml", "checkpoint-3/x", ".hidden"])
def test_a_folder_with_somebodys_files_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"run_dir: wanted a new or empty folder.*{MARKER}"):
        claim(tmp_path / "run")
    assert listing(tmp_path) == before


def test_a_new_an_empty_and_a_claimed_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/deep", "empty", "empty"):
        claim(tmp_path / name)
        assert (tmp_path / name / MARKER).is_file()
    (tmp_path / "empty/anything").touch()
    claim(tmp_path / "empty")


def test_a_claim_that_was_killed_half_way_can_be_made_again(tmp_path: Path) -> None:
    (tmp_path / f".{MARKER}.123.abcdef01.tmp").write_text("{")
    claim(tmp_path)
    config = Config.model_validate(
        {"run_dir": str(tmp_path), "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}}
    )
    save_config(config, tmp_path)  # once the run is locked: another start may be claiming before
    assert {f.name for f in tmp_path.iterdir()} == {MARKER, "resolved.yaml"}


@pytest.mark.parametrize(
    "given", ["", "  ", "~", "~/runs", "$HOME", "${HOME}/run", "runs/$USER", "/", str(Path.home())]
)
def test_a_run_dir_that_no_shell_expanded_or_is_a_home_is_refused(given: str) -> None:
    (found,) = run_dir_problems(given)
    assert found.startswith("run_dir: wanted ")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("text")
    (found,) = run_dir_problems(str(tmp_path / "run"))
    assert "found the file" in found and (tmp_path / "run").read_text() == "text"


def test_names_that_no_system_takes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to("back")
    (tmp_path / "back").symlink_to("there")
    for given in (tmp_path / "there", tmp_path / "there/run", tmp_path / ("x" * 300)):
        (found,) = run_dir_problems(str(given))
        assert found.startswith("run_dir: wanted a folder that can be made")


def test_nothing_new_is_put_into_what_a_run_replaces(tmp_path: Path) -> None:
    claim(tmp_path)
    begin(tmp_path, "prepare", ["prepared"])
    (found,) = new_folder_problems("--out", tmp_path / "prepared/mine")
    assert "which the run replaces" in found
    assert new_folder_problems("--out", tmp_path / "preparedness/mine") == []
    for taken in (tmp_path, Path("/dev/null/x")):
        assert len(new_folder_problems("--out", taken)) == 1
    (tmp_path / "link").symlink_to("nowhere")
    assert "a new folder" in new_folder_problems("--out", tmp_path / "link")[0]


def test_only_what_a_record_names_is_replaced(tmp_path: Path) -> None:
    claim(tmp_path)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/mine").write_text("mine")
    with pytest.raises(UserError, match="what no start of this run has written"):
        begin(tmp_path, "prepare", ["prepared"])
    (tmp_path / "prepared/mine").rename(tmp_path / "elsewhere")
    (tmp_path / "prepared").rmdir()
    begin(tmp_path, "prepare", ["prepared"])
    (tmp_path / "prepared").mkdir()  # killed here: the next start may replace it
    begin(tmp_path, "prepare", ["prepared"])
    mark_done(tmp_path, "prepare", {}, ["prepared"], 0.0)
    begin(tmp_path, "prepare", ["prepared"])


def test_what_a_killed_attempt_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    names = [".out.12.0123abcd.tmp", ".out.0123abcd.old", ".out.txt", ".outer.12.0123abcd.tmp"]
    for name in names:
        (tmp_path / name).touch()
    begin(tmp_path, "unit", ["out"])
    (tmp_path / "out").mkdir()
    for name in (".part.12.0123abcd.tmp", ".hidden"):
        (tmp_path / "out" / name).touch()
    begin(tmp_path, "unit", ["out"])
    assert [f.name for f in (tmp_path / "out").iterdir()] == [".hidden"]
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_file()) == sorted(names[2:])


def test_a_resolved_config_changed_by_hand_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from grads_ds.cli import main

    run = tmp_path / "run"
    tree = {"run_dir": str(run), "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}}
    claim(run)
    save_config(Config.model_validate(tree), run)
    own = run / RESOLVED
    own.write_text("# my notes\n" + own.read_text())
    before = listing(run)
    assert main(["select", str(own)]) == 2
    assert "copy it to another name" in capsys.readouterr().err and listing(run) == before
