"""A snapshot is the model that a training of so many steps would have given."""

from __future__ import annotations

from pathlib import Path

import torch

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.training.snapshots import snapshot_steps
from ranks import run_on_ranks
from tests.training.test_train import logits, make_config, make_rows


def train_for(config: Config, name: str, steps: int, snapshots: dict[int, Path]) -> None:
    from grads_ds.training.snapshots import Snapshots
    from grads_ds.training.train import TrainingJob, train_model

    folder = Path(config.run_dir)
    places = [folder / name, folder / f"{name}-work", folder / f"{name}-tb"]
    train_model(
        TrainingJob(
            config,
            config.sft,
            make_rows(),
            config.model.path,
            *places,
            steps,
            what=name,
            identity="test",
            callbacks=[Snapshots(config, snapshots)],
        )
    )


def train_both(config: Config) -> None:
    folder = Path(config.run_dir)
    (folder / "old").mkdir(exist_ok=True)  # of an earlier training, which early stopping ended
    train_for(config, "long", 6, {3: folder / "half", 99: folder / "old"})
    train_for(config, "short", 3, {})


def test_a_snapshot_is_the_model_of_a_shorter_training(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    sft = {"lr_scheduler": "constant", "warmup_ratio": 0}
    run_on_ranks(2, train_both, make_config(base, tmp_path, sft=sft))
    half, short, long = (logits(tmp_path / name) for name in ("half", "short", "long"))
    torch.testing.assert_close(half, short, atol=1e-5, rtol=0)
    assert (long - half).abs().max() > 1e-2
    assert (tmp_path / "half/tokenizer.json").is_file() and not (tmp_path / "old").exists()


def test_a_share_of_the_steps_is_at_least_the_first_and_before_the_last() -> None:
    shares = {0.01: Path("a"), 0.5: Path("b"), 0.99: Path("c")}
    assert snapshot_steps(shares, 10) == {1: Path("a"), 5: Path("b")}
    assert snapshot_steps({0.5: Path("b"), 0.52: Path("c")}, 10) == {5: Path("b")}
    assert snapshot_steps(shares, 1) == {}
