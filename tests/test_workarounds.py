"""A model that is done with is freed: one process trains and judges many.

(Seen with DeepSpeed 0.19.8, whose destroy keeps them.)
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from conftest import make_tiny_model
from grads_ds.config.config import Config
from ranks import run_on_ranks
from tests.training.test_train import make_config, train


def models_left(config: Config) -> list[int]:
    """Live models of this process after a training and a frozen pass, twice."""
    from grads_ds.engine.model import frozen_model

    left = []
    for name in ("one", "two"):
        train(config, name)
        with frozen_model(config, config.model.path) as (model, engine):
            for _ in range(3):
                model(torch.tensor([[7, 8, 9]]))
        del model, engine
        gc.collect()
        left.append(sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()))
    return left


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_is_done_with_is_freed(stage: int, tmp_path: Path) -> None:
    config = make_config(make_tiny_model(tmp_path / "base"), tmp_path, stage)
    assert run_on_ranks(1, models_left, config) == [[0, 0]]
