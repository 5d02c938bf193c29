"""A training that is told to stop writes a checkpoint, ends with 143, and is gone on from there."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from conftest import make_tiny_model
from grads_ds import cli
from grads_ds.commands import export
from grads_ds.config.config import Config
from grads_ds.config.errors import StoppedBySignal
from grads_ds.distributed import heartbeat
from grads_ds.run_dir.digests import sha256
from grads_ds.training.checkpoint_mark import read_mark, write_mark
from ranks import run_on_ranks
from tests.training.test_checkpoint_content import plant
from tests.training.test_train import logits, make_config, make_rows

STEPS = 6


class Sends(TrainerCallback):
    """Sends this process a signal at the beginning of a step; keeps the first step and losses."""

    def __init__(self, number: int | None, at: int):
        self.number, self.at, self.begins = number, at, -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begins = state.global_step if self.begins < 0 else self.begins
        if self.number is not None and state.global_step == self.at:
            os.kill(os.getpid(), self.number)


def train(
    config: Config, name: str, number: int | None, on_rank: int, identity: str = "test"
) -> tuple[int, str]:
    """(first step, what it was stopped by) of a training of 6 steps, one rank told at step 2."""
    from grads_ds.distributed import ranks
    from grads_ds.training.train import TrainingJob, train_model

    folder = Path(config.run_dir)
    sends = Sends(number if ranks.rank() == on_rank else None, at=2)
    before = signal.getsignal(signal.SIGTERM)
    job = TrainingJob(
        config,
        config.sft,
        make_rows(),
        config.model.path,
        folder / name,
        folder / f"{name}-work",
        folder / f"{name}-tb",
        STEPS,
        what=name,
        identity=identity,
        callbacks=[sends],
    )
    try:
        train_model(job)
    except StoppedBySignal as stopped:
        return sends.begins, str(stopped)
    finally:
        assert signal.getsignal(signal.SIGTERM) == before
    return sends.begins, ""


def stop_and_go_on(config: Config) -> list[tuple[int, str]]:
    from grads_ds.distributed import ranks

    told = train(config, "stopped", signal.SIGTERM, on_rank=1)
    ranks.from_main(lambda: plant_code(Path(config.run_dir)))
    changed = train(config, "changed", None, 0, identity="of another learning rate")
    again = train(config, "stopped", signal.SIGUSR1, on_rank=0)
    whole = train(config, "whole", None, 0)
    try:
        hostile = train(config, "hostile", None, 0)
    except pickle.UnpicklingError as refused:
        hostile = (-1, str(refused))
    return [told, changed, again, whole, hostile]


def plant_code(folder: Path) -> None:
    """A copy of the stopped training whose optimizer parts are code, marked as whole."""
    shutil.copytree(folder / "stopped-work", folder / "changed-work")  # as it is
    shutil.copytree(folder / "stopped-work", folder / "hostile-work")
    checkpoint = folder / "hostile-work/checkpoint-3"
    mark = read_mark(checkpoint)
    assert mark is not None
    for file in checkpoint.rglob("*optim_states.pt"):
        plant(file, folder / "made")
        state = {"size": file.stat().st_size, "sha256": sha256(file)}
        mark["files"][str(file.relative_to(checkpoint))] = state
    write_mark(checkpoint, mark)


def test_every_rank_stops_with_a_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    import torch

    config = make_config(make_tiny_model(tmp_path / "base"), tmp_path)
    for told, changed, again, whole, hostile in run_on_ranks(2, stop_and_go_on, config):
        assert told == (0, "stopped: told to stop; checkpoint-3 is written")
        assert changed == (0, "")  # other inputs: from the beginning
        # gone on from step 3, past the step at which it would be told again
        assert again == (3, "") and whole == (0, "")
        assert hostile[0] == -1 and "posix.mkdir" in hostile[1]
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "changed-work.test/checkpoint-3").is_dir()
    for name in ("changed", "stopped"):
        torch.testing.assert_close(
            logits(tmp_path / name), logits(tmp_path / "whole"), atol=1e-5, rtol=0
        )


def test_the_command_ends_with_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> int:
        raise StoppedBySignal("sft on full: told to stop; checkpoint-3 is written")

    monkeypatch.setattr(export, "handle", stopped)
    assert cli.main(["export", "c.yaml", "--to", "trl", "--out", "x"]) == 143
    assert "checkpoint-3 is written; start it again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_supervised_rank_that_is_signalled_itself_is_told(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm signals every process of a step, whoever started it."""
    from grads_ds.training.stop_signal import StopSignal

    state: Any = None
    ended: list[int] = []
    monkeypatch.setattr(heartbeat, "supervised", lambda: True)
    before = signal.signal(number, lambda *_: ended.append(number))
    try:
        stop = StopSignal()
        stop.on_train_begin(state, state, state)
        os.kill(os.getpid(), number)
        assert stop._told == 1 and not ended
        stop.on_train_end(state, state, state)
        os.kill(os.getpid(), number)
        assert ended == [number]
    finally:
        signal.signal(number, before)
