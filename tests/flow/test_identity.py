"""What a checkpoint is of: every input of a training changes its identity, nothing else does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.config import Config
from grads_ds.flow.unit_inputs import probe_units, sft_units
from grads_ds.run_dir.units import mark_done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "run/selection").mkdir(parents=True)
    for unit in ("prepare", "probe/record", "select/selected"):
        mark_done(tmp_path / "run", unit, {}, ["selection"], 0.0)
    return tmp_path


def identities(folder: Path, **changes: Any) -> tuple[str, str]:
    """Of the preliminary training and of the main fine-tuning."""
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"train": ["pool.jsonl"]},
        "deepspeed": str(folder / "zero3.json"),
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if name else value
    config = Config.model_validate(tree)
    units = [probe_units(config, folder / "run")[0], sft_units(config, folder / "run")[0]]
    assert [unit.name for unit in units] == ["probe/train", "sft/selected"]
    return units[0].identity, units[1].identity


@pytest.mark.parametrize(
    ("changes", "probe", "sft"),
    [
        ({}, True, True),
        ({"sft__learning_rate": 0.5}, True, False),
        ({"probe__learning_rate": 0.5}, False, True),
        ({"seed": 1}, False, False),
        ({"model__dtype": "float32"}, False, False),
        ({"model__lora": {"r": 4}}, False, False),
        ({"sft__epochs": 4}, True, False),
        # how often and how many, not what
        ({"sft__checkpoint_steps": 3, "sft__checkpoints_kept": 7}, True, True),
        ({"probe__checkpoint_steps": 3, "probe__flush_seconds": 1.0}, True, True),
        ({"probe__tokens_per_microbatch": 64}, True, True),
    ],
)
def test_keys_of_the_config(folder: Path, changes: Any, probe: bool, sft: bool) -> None:
    before, now = identities(folder), identities(folder, **changes)
    assert (before[0] == now[0], before[1] == now[1]) == (probe, sft)


def test_files_and_earlier_units(folder: Path) -> None:
    seen = [identities(folder)]
    mark_done(folder / "run", "select/selected", {}, ["selection"], 0.0)
    seen.append(identities(folder))
    assert seen[1][0] == seen[0][0] and seen[1][1] != seen[0][1]
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    seen.append(identities(folder))
    (folder / "model/model.safetensors").write_bytes(b"Weights")
    seen.append(identities(folder))
    for one, other in itertools.pairwise(seen[1:]):
        assert one[0] != other[0] and one[1] != other[1]
