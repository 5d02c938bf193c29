"""A model that is done with is freed: one process trains and judges many.

(Seen with DeepSpeed 0.19.8, whose destroy keeps them.)
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from conftest import REPO, make_tiny_model
from grads_ds import workarounds
from grads_ds.config.config import Config
from grads_ds.workarounds import WORKAROUNDS, other_versions, warn_of_other_versions
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


def test_each_workaround_names_where_it_stands_and_the_test_that_retires_it() -> None:
    for item in WORKAROUNDS:
        assert (REPO / item.where).is_file() and (REPO / item.test).is_file(), item


def test_another_version_is_warned_of_once_with_the_tests_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"deepspeed": "0.20.1", "torch": "2.13.0+cpu", "transformers": "5.230.1"}
    monkeypatch.setattr(workarounds.metadata, "version", lambda name: installed.get(name, "26.0.0"))
    warn_of_other_versions()
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["deepspeed", "transformers"]
    assert "0.20.1 is installed" in said[0] and "tests/training/test_checkpoints.py" in said[0]


def test_the_installed_versions_are_those_it_was_seen_with() -> None:
    assert other_versions() == []
