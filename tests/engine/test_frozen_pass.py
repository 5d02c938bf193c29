"""The frozen pass: the user's ZeRO-3 settings reach it, and ranks without work take part and write
nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.data.batches import plan_batches
from grads_ds.distributed import ranks
from grads_ds.engine.frozen_pass import score_plan
from grads_ds.engine.settings import scoring_settings
from ranks import run_on_ranks


def config_with(folder: Path, deepspeed: dict[str, Any]) -> Config:
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    return Config(
        run_dir=str(folder / "run"),
        deepspeed=str(folder / "deepspeed.json"),
        data={"train": ["none"]},
        model={"path": str(make_tiny_model(folder / "model")), "dtype": "float32"},
    )


def test_sharding_settings_are_passed_on_and_what_only_trains_is_not(tmp_path: Path) -> None:
    kept = {
        "offload_param": {"device": "nvme", "nvme_path": "/scratch"},
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": True,
        "stage3_max_live_parameters": 12345,
    }
    config = config_with(
        tmp_path,
        {
            "zero_optimization": kept | {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            "optimizer": {"type": "AdamW"},
            "train_batch_size": 64,
            "gradient_accumulation_steps": "auto",
            "aio": {"block_size": 1048576},
            "bf16": {"enabled": "auto"},
        },
    )
    settings = scoring_settings(config)
    zero = settings["zero_optimization"]
    assert (
        {name: zero[name] for name in kept} == kept
        and zero["stage"] == 3
        and "offload_optimizer" not in zero
    )
    assert settings["aio"] == {"block_size": 1048576} and settings["bf16"]["enabled"] is False
    assert not {"optimizer", "train_batch_size", "gradient_accumulation_steps"} & set(settings)


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_that_shard_only_training_state_become_none(tmp_path: Path, stage: int) -> None:
    config = config_with(tmp_path, {"zero_optimization": {"stage": stage, "overlap_comm": True}})
    assert scoring_settings(config)["zero_optimization"] == {"stage": 0}


def score_two(config: Config) -> tuple[int, list[int]]:
    """This rank's share of two samples."""
    rows = [
        {"input_ids": [8, 9, 10, 11], "labels": [-100, 9, 10, 11]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    lengths = np.array([4, 2])
    plan = plan_batches(lengths, ranks.world(), 4, config.seed)
    found: list[int] = []
    for indices, norms, _ in score_plan(
        config, config.model.path, rows, plan, lengths, ["lm_head"], "mean", "two samples"
    ):
        assert len(indices) == len(norms.loss) and torch.isfinite(norms.norms["lm_head"]).all()
        found += indices
    return ranks.rank(), found


def test_ranks_without_work_take_part_and_yield_nothing(tmp_path: Path) -> None:
    config = config_with(
        tmp_path, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    )
    shares = [found for _, found in run_on_ranks(3, score_two, config)]
    assert sorted(map(len, shares)) == [0, 1, 1] and sorted(
        index for share in shares for index in share
    ) == [0, 1]
