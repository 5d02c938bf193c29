"""A training that is killed and resumed, on the same or another number of ranks, is the training that was never killed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from conftest import make_tiny_model
from grads_ds.checkpoints import COMPLETE, Checkpoints
from grads_ds.config import Config
from ranks import run_on_ranks
from test_train import logits, make_config
from test_trainer import Logs, uneven_rows

STEPS = 8


class Dies(TrainerCallback):
    """Kills its rank when a step begins, once the checkpoint of every earlier second step is written."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    config: Config, name: str, dies_at: int | None = None, in_save: bool = False
) -> tuple[list[float], list[str]]:
    from grads_ds import ranks
    from grads_ds.train import train_model

    folder, logs, kept = Path(config.run_dir), Logs(), []
    marks = Checkpoints.on_save

    def on_save(self: Checkpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if in_save and state.global_step == dies_at and ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        marks(self, args, state, control, **kwargs)
        ranks.barrier()
        kept[:] = sorted(f.name for f in Path(args.output_dir).iterdir())

    Checkpoints.on_save = on_save  # type: ignore[method-assign]
    callbacks = [logs, *([Dies(dies_at)] if dies_at is not None and not in_save else [])]
    train_model(
        config, config.sft, uneven_rows(), config.model.path, folder / name, folder / f"{name}-work", folder / f"{name}-tb",
        STEPS, what=name, callbacks=callbacks,
    )  # fmt: skip
    return logs.losses, kept


def dies(ranks: int, config: Config, name: str, *how: Any) -> None:
    with pytest.raises(AssertionError, match="ended with -9"):
        run_on_ranks(ranks, train, config, name, *how)
    assert not (Path(config.run_dir) / name).exists()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    sft = {"checkpoint_steps": 2, "checkpoints_kept": 1}
    return make_config(make_tiny_model(tmp_path / "base", tied=True), tmp_path, sft=sft)


def test_a_killed_training_goes_on_where_it_was_on_any_number_of_ranks(config: Config, tmp_path: Path) -> None:
    whole, kept = run_on_ranks(2, train, config, "whole")[0]
    assert len(whole) == STEPS and whole[-1] < whole[0] - 0.1
    assert kept == ["checkpoint-6"]  # the model itself follows the last step

    dies(2, config, "killed", 5)
    work = tmp_path / "killed-work"
    shutil.copytree(work / "checkpoint-4", work / "checkpoint-5", ignore=shutil.ignore_patterns(COMPLETE, "*.pt"))
    shutil.copytree(work, tmp_path / "resized-work")
    losses, _ = run_on_ranks(2, train, config, "killed")[0]
    assert losses == pytest.approx(whole, abs=1e-6)
    torch.testing.assert_close(logits(tmp_path / "killed"), logits(tmp_path / "whole"), atol=1e-5, rtol=0)

    dies(1, config, "resized", 7)
    losses, _ = run_on_ranks(2, train, config, "resized")[0]
    assert losses == pytest.approx(whole, abs=1e-4)
    torch.testing.assert_close(logits(tmp_path / "resized"), logits(tmp_path / "whole"), atol=2e-3, rtol=0)


def test_a_checkpoint_whose_ranks_did_not_all_finish_is_not_taken(config: Config, tmp_path: Path) -> None:
    dies(2, config, "unfinished", 4, True)
    work = tmp_path / "unfinished-work"
    assert (work / "checkpoint-4").is_dir() and not (work / "checkpoint-4" / COMPLETE).exists()
    assert (work / "checkpoint-2" / COMPLETE).exists()  # kept: nothing newer is whole
    shutil.rmtree(work / "checkpoint-4/global_step4")
    losses, _ = run_on_ranks(2, train, config, "unfinished")[0]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
