"""One definition of the loss: the optimizer's, the watched held-out one, evaluation's and the
probe's; weights, early stopping.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.training.trainer import SftTrainer
from ranks import run_on_ranks
from tests.training.test_train import ROWS, logits, make_config

LENGTHS = np.random.default_rng(1).integers(6, 30, ROWS)


def uneven_rows(weights: list[float] | None = None) -> Dataset:
    """Rows of different lengths, the first third of each not a target."""
    ids = [
        np.random.default_rng(n).integers(7, 100, length).tolist()
        for n, length in enumerate(LENGTHS)
    ]
    columns: dict[str, Any] = {
        "input_ids": ids,
        "labels": [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids],
    }
    return Dataset.from_dict(columns | ({"weight": weights} if weights else {}))


class Logs(TrainerCallback):
    """Keeps what the trainer logged."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.held_out = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]


def train(config: Config, name: str, rows: Any, steps: int, **options: Any) -> Logs:
    from grads_ds.training.train import TrainingJob, train_model

    folder, logs = Path(config.run_dir), Logs()
    train_model(
        TrainingJob(
            config,
            config.sft,
            rows,
            config.model.path,
            folder / name,
            folder / f"{name}-work",
            folder / f"{name}-tb",
            steps,
            what=name,
            callbacks=[logs],
            **options,
            identity="test",
        )
    )
    return logs


def evaluated_loss(config: Config, path: str, rows: Any) -> float:
    """The evaluate stage's loss of a set."""
    from grads_ds.data.tokenizer import load_tokenizer
    from grads_ds.evaluate.measured_sets import measured_set
    from grads_ds.evaluate.token_pass import pass_over, reading

    measured = measured_set("rows", rows, load_tokenizer(config.model))
    with reading(config, path) as reader:
        result, _ = pass_over(reader, config, measured, "evaluate")
    return float((result.loss * result.targets).sum() / result.targets.sum())


def four_losses(config: Config) -> dict[str, float]:
    from grads_ds.data.batches import plan_batches
    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import lengths_of, score_plan
    from grads_ds.engine.model import frozen_model
    from grads_ds.training.trainer import held_out_loss

    rows = uneven_rows()
    found = {}
    found["evaluate"] = evaluated_loss(config, config.model.path, rows)
    lengths = lengths_of(rows)
    plan = plan_batches(lengths, ranks.world(), 128, config.seed)
    probe = [
        (s.loss * s.num_target_tokens, s.num_target_tokens)
        for _, s, _ in score_plan(
            config, config.model.path, rows, plan, lengths, "all", "mean", "probe"
        )
    ]
    sums = np.sum(
        ranks.all_gather_object(
            np.array([[float(loss.sum()), int(n.sum())] for loss, n in probe]).sum(0)
        ),
        axis=0,
    )
    found["probe"] = sums[0] / sums[1]
    with frozen_model(config, config.model.path) as (model, _):
        found["held out"] = held_out_loss(model, rows, 3, 0)
    found["trainer"] = train(config, "plain", rows, 1).losses[0]
    found["weighted trainer"] = train(config, "weighted", uneven_rows([2.5] * ROWS), 1).losses[0]
    return found


def test_the_optimizers_loss_is_evaluations_and_the_probes(tmp_path: Path) -> None:
    # every row in one step, over two ranks and three accumulation steps, all of different token
    # counts
    config = make_config(
        make_tiny_model(tmp_path / "base"),
        tmp_path,
        sft={"batch_size": ROWS, "micro_batch_size": 4},
    )
    for losses in run_on_ranks(2, four_losses, config):
        assert losses == pytest.approx(dict.fromkeys(losses, losses["evaluate"]), rel=1e-5)
    torch.testing.assert_close(
        logits(tmp_path / "weighted"), logits(tmp_path / "plain"), atol=1e-5, rtol=0
    )


def train_with_weights(config: Config) -> None:
    weights = [float(n % 3) for n in range(ROWS)]
    repeated = uneven_rows().select([n for n in range(ROWS) for _ in range(n % 3)])
    assert len(repeated) == ROWS
    train(config, "weighted", uneven_rows(weights), 1)
    train(config, "repeated", repeated, 1)


def test_a_sample_of_weight_two_is_a_sample_that_comes_twice(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    sft = {"batch_size": ROWS, "micro_batch_size": 4, "warmup_ratio": 0}
    run_on_ranks(2, train_with_weights, make_config(base, tmp_path, sft=sft))
    assert (logits(tmp_path / "weighted") - logits(base)).abs().max() > 0.01
    torch.testing.assert_close(
        logits(tmp_path / "weighted"), logits(tmp_path / "repeated"), atol=1e-4, rtol=0
    )


def train_until_it_rises(config: Config) -> tuple[list[float], list[float]]:
    stopping = config.sft.early_stopping
    logs = train(
        config,
        "stopped",
        uneven_rows(),
        60,
        early_stopping=stopping,
        held_out=uneven_rows().select(range(5)),
    )
    folder = str(Path(config.run_dir) / "stopped")
    return logs.held_out, [evaluated_loss(config, folder, uneven_rows().select(range(5)))]


def test_training_ends_when_the_watched_loss_rises_and_keeps_the_best_model(tmp_path: Path) -> None:
    sft = {
        "learning_rate": 0.3,
        "lr_scheduler": "constant",
        "warmup_ratio": 0,
        "checkpoints_kept": 1,
        "early_stopping": {"set": "domain", "every": 2, "patience": 2},
    }
    data = {"train": ["rows"], "validation": {"domain": "rows"}}
    config = make_config(make_tiny_model(tmp_path / "base"), tmp_path, sft=sft, data=data)
    held_out, after = run_on_ranks(2, train_until_it_rises, config)[0]
    assert 3 <= len(held_out) < 30
    assert min(held_out) == held_out[-3]  # two looks without a lower one, then the end
    assert after[0] == pytest.approx(min(held_out), rel=1e-4)


def test_the_private_places_of_transformers_that_this_trainer_stands_on_are_there() -> None:
    """Seen with transformers 5.23: the best model comes back, and a checkpoint is written, through
    the two methods overridden here.
    """
    assert list(inspect.signature(Trainer._load_best_model).parameters) == ["self"]
    assert "self._load_best_model()" in inspect.getsource(Trainer)
    assert "self.save_model(output_dir, _internal_call=True)" in inspect.getsource(
        Trainer._save_checkpoint
    )
    assert {"_load_best_model", "save_model"} <= set(vars(SftTrainer))
