"""A training that is killed and resumed, on the same or another number of ranks, is the training
that was never killed.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainerCallback

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.training.checkpoint_mark import COMPLETE
from grads_ds.training.checkpoints import Checkpoints
from ranks import run_on_ranks
from tests import forked_ranks
from tests.training.rewritten import check_universal
from tests.training.test_train import logits, make_config
from tests.training.test_trainer import Logs, uneven_rows

STEPS = 8


class Stopped(Exception):
    """What ends a training in the middle where its process shall live."""


class Ends(TrainerCallback):
    """Ends the training when a step begins: by SIGKILL, or by an exception that leaves the process
    alive. Notes the first step.
    """

    begins: int | None = None

    def __init__(self, step: int | None, kill: bool):
        self.step, self.kill = step, kill

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begins = state.global_step if self.begins is None else self.begins
        if state.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stopped


class Job(NamedTuple):
    """One training: its settings, the name of its files, where it ends before its time and how."""

    config: Config
    name: str
    ends_at: int | None = None
    kill: bool = False
    # killed on the last rank, its part of the checkpoint written and the mark not
    in_save: bool = False


class Trained(NamedTuple):
    """What a finished training reports."""

    losses: list[float]  # of every step, those before it was ended included
    held_out: list[float]
    begins: int  # the first step of this start
    kept: dict[str, list[str]]  # the checkpoint folders after the last save, and their files


def train(job: Job) -> Trained | None:
    from grads_ds.distributed import ranks
    from grads_ds.training.train import TrainingJob, train_model

    config, name = job.config, job.name
    folder, logs, kept = Path(config.run_dir), Logs(), {}
    ends = Ends(None if job.in_save else job.ends_at, job.kill)
    marks = Checkpoints.on_save

    def on_save(self: Checkpoints, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if job.in_save and state.global_step == job.ends_at and ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        marks(self, args, state, control, **kwargs)
        ranks.barrier()
        kept.clear()
        kept.update(
            {
                f.name: sorted(str(p.relative_to(f)) for p in f.rglob("*"))
                for f in Path(args.output_dir).iterdir()
            }
        )

    Checkpoints.on_save = on_save  # type: ignore[method-assign]
    watched = {
        "early_stopping": config.sft.early_stopping,
        "held_out": uneven_rows().select(range(5)),
    }
    try:
        train_model(
            TrainingJob(
                config,
                config.sft,
                uneven_rows(),
                config.model.path,
                folder / name,
                folder / f"{name}-work",
                folder / f"{name}-tb",
                60 if config.sft.early_stopping else STEPS,
                what=name,
                callbacks=[logs, ends],
                **watched if config.sft.early_stopping else {},
                identity="test",
            )
        )
    except Stopped:
        return None
    finally:
        Checkpoints.on_save = marks  # type: ignore[method-assign]
    return Trained(logs.losses, logs.held_out, ends.begins, kept)


def train_all(*jobs: Job) -> list[Trained | None]:
    return [train(job) for job in jobs]


def train_on(ranks: int, *jobs: Job) -> list[Any]:
    """What rank 0 found of every job, one after the other in the same processes."""
    return run_on_ranks(ranks, train_all, *jobs)[0]


def dies(ranks: int, job: Job) -> None:
    with pytest.raises(AssertionError, match="ended with -9"):
        run_on_ranks(ranks, train, job)
    assert not (Path(job.config.run_dir) / job.name).exists()


def settings(folder: Path, **sections: Any) -> Config:
    sft = {"checkpoint_steps": 2, "checkpoints_kept": 1} | sections.pop("sft", {})
    return make_config(folder / "base", folder, sft=sft, **sections)


def same(folder: Path, name: str, whole: str, atol: float) -> None:
    torch.testing.assert_close(logits(folder / name), logits(folder / whole), atol=atol, rtol=0)


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was_on_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, one and two again: every parameter, adapters, and a training that ends itself and
    takes its best model back.
    """
    # checkpoints are rewritten by processes that are forked from one that has done the imports
    monkeypatch.setenv("PYTHONPATH", forked_ranks.python_path())
    monkeypatch.setenv("FORK_ALL", "1")
    make_tiny_model(tmp_path / "base", tied=True)
    full = settings(tmp_path)
    lora = settings(tmp_path, model={"lora": {"r": 4, "alpha": 16}}, sft={"learning_rate": 0.02})
    stopping = {"set": "domain", "every": 2, "patience": 2}
    early = settings(
        tmp_path,
        data={"train": ["rows"], "validation": {"domain": "rows"}},
        sft={
            "learning_rate": 0.3,
            "lr_scheduler": "constant",
            "warmup_ratio": 0,
            "early_stopping": stopping,
        },
    )
    whole, whole_lora, whole_early, *ended = train_on(
        2,
        Job(full, "whole"),
        Job(lora, "whole-lora"),
        Job(early, "whole-early"),
        Job(lora, "lora", 5),
        Job(early, "early", 5),
        Job(settings(tmp_path, stage=2), "stage2", 3),
    )
    assert ended == [None, None, None]
    for checkpoint in ("lora-work/checkpoint-4", "stage2-work/checkpoint-2"):
        check_universal(tmp_path / checkpoint)
    for trained in (whole, whole_lora):
        assert len(trained.losses) == STEPS and trained.losses[-1] < trained.losses[0] - 0.1
        assert list(trained.kept) == ["checkpoint-6"]  # the model itself follows the last step
        # the engine's parts are all there is of the model: no second copy, gathered on one rank
        assert not [
            file for file in trained.kept["checkpoint-6"] if file.endswith((".safetensors", ".bin"))
        ]
    looks = len(whole_early.held_out)
    assert (
        looks >= 4
        and min(whole_early.held_out) == whole_early.held_out[-3]
        and len(whole_early.losses) == 2 * looks < 60
    )

    dies(2, Job(full, "killed", 5, kill=True))
    work = tmp_path / "killed-work"
    shutil.copytree(
        work / "checkpoint-4",
        work / "checkpoint-5",
        ignore=shutil.ignore_patterns(COMPLETE, "*.pt"),
    )
    shutil.copytree(work, tmp_path / "resized-work")
    check_universal(work / "checkpoint-4")

    _, _, resized_early = train_on(
        1, Job(full, "resized", 7), Job(lora, "lora", 7), Job(early, "early")
    )
    killed, resized, resized_lora = train_on(
        2, Job(full, "killed"), Job(full, "resized"), Job(lora, "lora")
    )
    assert (killed.begins, resized.begins, resized_lora.begins, resized_early.begins) == (
        4,
        6,
        6,
        4,
    )
    assert killed.losses == pytest.approx(whole.losses, abs=1e-6)
    same(tmp_path, "killed", "whole", atol=1e-5)
    assert resized.losses == pytest.approx(whole.losses, abs=1e-4)
    same(tmp_path, "resized", "whole", atol=2e-3)
    assert resized_lora.losses == pytest.approx(whole_lora.losses, abs=1e-4)
    same(tmp_path, "lora", "whole-lora", atol=2e-3)
    assert resized_early.held_out == pytest.approx(whole_early.held_out, abs=1e-4)
    assert len(resized_early.losses) == len(whole_early.losses)  # it ends at the same step
    same(tmp_path, "early", "whole-early", atol=2e-3)  # and gives back the same look's model


@pytest.mark.slow
def test_a_checkpoint_whose_ranks_did_not_all_finish_is_not_taken(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base", tied=True)
    job = Job(settings(tmp_path), "unfinished", 4, kill=True, in_save=True)
    dies(2, job)
    work = tmp_path / "unfinished-work"
    assert (work / "checkpoint-4").is_dir() and not (work / "checkpoint-4" / COMPLETE).exists()
    assert (work / "checkpoint-2" / COMPLETE).exists()  # kept: nothing newer is whole
    shutil.rmtree(work / "checkpoint-4/global_step4")
    (trained,) = train_on(2, job._replace(ends_at=None, in_save=False))
    assert (
        trained.begins == 2
        and len(trained.losses) == STEPS
        and trained.losses[-1] < trained.losses[0] - 0.1
    )
