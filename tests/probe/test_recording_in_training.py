"""Norms recorded while the preliminary phase trains: each of its own step, whole after a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from grads_ds.config.columns import norm_columns
from grads_ds.config.config import Config
from ranks import run_on_ranks
from tests.probe.jobs import ROWS, make_config, stage, table_of


@pytest.mark.slow
def test_norms_recorded_while_training_are_those_of_each_samples_own_step(tmp_path: Path) -> None:
    """With a learning rate near zero every step's model is the base model, whose norms a frozen
    pass gives.
    """
    training = {
        "batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 1e-12,
        "flush_seconds": 0,
        "max_grad_norm": 0.1,
    }
    config = make_config(
        tmp_path, probe=training | {"epochs": 0.5, "record": "during", "layers": "all"}
    )
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    table = table_of(config)
    assert table["sample_id"].tolist() == list(range(ROWS)) and set(table["status"]) == {"ok"}
    # three steps of eight samples; the others were scored with the trained model
    assert table.groupby("step").size().to_dict() == {0: 8, 1: 8, 2: 8, 3: ROWS - 24}
    assert not (Path(config.run_dir) / "probe/trained.json").exists()
    frozen = config.model_copy(
        update={
            "run_dir": str(tmp_path / "frozen"),
            "probe": config.probe.model_copy(update={"epochs": 0.0}),
        }
    )
    stage("prepare", frozen)
    run_on_ranks(1, stage, "probe", frozen)
    exact = table_of(frozen)
    for name in ("loss", "num_tokens", "num_target_tokens", *norm_columns("all")):
        np.testing.assert_allclose(table[name], exact[name], rtol=2e-5, atol=1e-9)
    assert table["sample_hash"].equals(exact["sample_hash"])


def train_until(config: Config, step: int) -> None:
    """Run the probe in this process and die, as by SIGKILL, when optimizer step `step` begins."""
    from grads_ds.probe.callback import GradNormCallback

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            os._exit(9)

    GradNormCallback.on_step_begin = die  # type: ignore[method-assign]
    stage("probe", config)


@pytest.mark.slow
def test_a_recording_killed_while_training_ends_with_the_same_table(tmp_path: Path) -> None:
    training = {
        "batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "epochs": 1,
        "record": "during",
    }
    config = make_config(tmp_path, probe=training | {"checkpoint_steps": 2, "flush_seconds": 0})
    stage("prepare", config)
    with pytest.raises(AssertionError, match="ended with 9"):
        run_on_ranks(2, train_until, config, 5)
    assert not (Path(config.run_dir) / "scores/table.parquet").exists()
    run_on_ranks(2, stage, "probe", config)
    whole = config.model_copy(update={"run_dir": str(tmp_path / "whole")})
    stage("prepare", whole)
    run_on_ranks(2, stage, "probe", whole)
    tables = [pq.read_table(Path(c.run_dir) / "scores/table.parquet") for c in (config, whole)]
    assert tables[0].equals(tables[1])
    assert len(set(tables[0]["step"].to_pylist())) == 6
