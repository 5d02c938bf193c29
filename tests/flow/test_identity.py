"""What a checkpoint is of: every input of a training changes its identity, nothing else does."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.config import Config
from grads_ds.config.probe import ProbeConfig
from grads_ds.flow.unit_inputs import probe_units, sft_units
from grads_ds.probe.identity import recording_of
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


class LongerSection(ProbeConfig):
    """The section with one more key, which no other file names."""

    depth: int = 3


def recorded(folder: Path, **probe: Any) -> tuple[str, str]:
    """What a recording without training is due by, and what its parts go by."""
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"train": ["pool.jsonl"], "validation": {"general": "general.jsonl"}},
    }
    config = Config.model_validate(tree)
    config = config.model_copy(update={"probe": LongerSection(epochs=0, **probe)})
    for name in ("pool", "general"):
        (folder / "run/prepared" / name).mkdir(parents=True, exist_ok=True)
    (unit,) = probe_units(config, folder / "run")
    return unit.identity, recording_of(config, folder / "run", config.model.path).key


GAIN, NEAR = {"extras": ["prompt_gain"]}, {"extras": ["hidden"], "anchor": "general"}


@pytest.mark.parametrize(
    ("before", "change", "due", "parts"),
    [
        ({}, {"depth": 4}, True, True),
        (GAIN, {"depth": 4}, True, True),
        ({}, {"layers": ["lm_head"]}, True, True),
        ({}, {"loss_reduction": "sum"}, True, True),
        (GAIN, {"other_prompts": 2}, True, True),
        (GAIN, {"contrast_rows": 9}, True, False),
        (NEAR, {"contrast_rows": 9}, True, True),
        ({}, {"controls": 0.1}, True, False),  # the pool's own scores stay
        ({}, {"contrast_rows": 9, "other_prompts": 2}, False, False),
        ({}, {"learning_rate": 0.5, "flush_seconds": 1.0}, False, False),
    ],
)
def test_a_recording_is_due_by_every_key_of_its_own(
    folder: Path, before: Any, change: Any, due: bool, parts: bool
) -> None:
    """A new key of the section is one of them unless something says that it is not."""
    first, second = recorded(folder, **before), recorded(folder, **before | change)
    assert (first[0] != second[0], first[1] != second[1]) == (due, parts)


def test_the_training_has_no_key_of_the_recording() -> None:
    both = LongerSection()
    assert not both.training_inputs().keys() & both.recording_inputs().keys()
    assert both.recording_inputs() == {
        "layers": ["embedding", "lm_head"],
        "loss_reduction": "mean",
        "depth": 3,
    }
    assert {"epochs", "record", "learning_rate"} <= both.training_inputs().keys()
