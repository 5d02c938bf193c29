"""Only a checkpoint that is whole, and of this very training, is ever gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from grads_ds.run_dir.digests import sha256
from grads_ds.training import checkpoints
from grads_ds.training.checkpoint_mark import COMPLETE, write_mark
from grads_ds.training.checkpoints import Checkpoints, last_checkpoint, set_strangers_aside

FILES = ("global_step/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth", "latest")


def checkpoint(work: Path, step: int, identity: str = "mine", best: Path | None = None) -> Path:
    folder = work / f"checkpoint-{step}"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    state = {"best_model_checkpoint": str(best) if best else None}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    files = {
        str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": sha256(f)}
        for f in folder.rglob("*")
        if f.is_file()
    }
    write_mark(folder, {"ranks": 1, "step": step, "identity": identity, "files": files})
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_the_newest_is_taken_and_what_was_not_finished_is_removed(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 10)
    shutil.copytree(newest, tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / COMPLETE).unlink()
    assert last_checkpoint(tmp_path, "mine") == str(newest)
    assert not (tmp_path / "checkpoint-12").exists()


@pytest.mark.parametrize("name", [*FILES, COMPLETE, "trainer_state.json"])
def test_a_damaged_newest_gives_way_to_the_one_before_it(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    flip(newest / name)
    assert last_checkpoint(tmp_path, "mine") == str(before)
    said = capsys.readouterr().out
    assert f"checkpoint-4: {name}" in said and "damaged-checkpoint-4" in said
    assert (tmp_path / "damaged-checkpoint-4").is_dir() and not newest.exists()


def test_one_whose_best_is_damaged_is_not_whole(tmp_path: Path) -> None:
    first = checkpoint(tmp_path, 2)
    best = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6, best=best)
    (best / FILES[0]).unlink()
    assert last_checkpoint(tmp_path, "mine") == str(first)


def test_no_whole_one_means_from_the_beginning(tmp_path: Path) -> None:
    for step in (2, 4):
        flip(checkpoint(tmp_path, step) / FILES[0])
    assert last_checkpoint(tmp_path, "mine") is None


def test_every_part_is_synced_before_the_mark_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, 2)
    (folder / COMPLETE).unlink()
    wanted = {f for f in folder.rglob("*") if f.is_file()} | {folder, tmp_path}
    synced: set[Path] = set()

    def noted(path: Path) -> None:
        assert not (folder / COMPLETE).exists()
        synced.add(path)

    monkeypatch.setattr(checkpoints, "sync", noted)
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=2)
    state.best_model_checkpoint = None
    Checkpoints(1, "mine").on_save(arguments, state, None)  # type: ignore[arg-type]
    assert synced >= wanted and last_checkpoint(tmp_path, "mine") == str(folder)
    (folder / COMPLETE).unlink()

    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "sync", broken)
    with pytest.raises(OSError, match="Input/output"):
        Checkpoints(1, "mine").on_save(arguments, state, None)  # type: ignore[arg-type]
    assert not (folder / COMPLETE).exists()


def test_another_trainings_checkpoints_are_set_aside_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "checkpoints"
    for number in ("", "-2"):
        checkpoint(work, 3, "0123456789abcdef")
        checkpoint(work, 5, "0123456789abcdef")
        assert last_checkpoint(work, "mine") is None
        aside = tmp_path / f"checkpoints.01234567{number}"
        assert f"2 checkpoints of a training with other inputs: set aside as {aside.name}" in (
            capsys.readouterr().out
        )
        assert (aside / "checkpoint-5" / FILES[0]).is_file() and not work.exists()
    set_strangers_aside(work, "mine")  # nothing there: nothing to do
