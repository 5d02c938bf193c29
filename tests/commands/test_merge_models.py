"""`grads-ds merge`: a model or an adapter between the base and a trained one, with a card; every
problem at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from grads_ds.cli import main
from grads_ds.config.config import Config
from grads_ds.run_dir.digests import content_digest
from grads_ds.run_dir.provenance import save_config
from grads_ds.run_dir.units import mark_done
from tests.evaluate.test_retention import trained_from


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base = make_tiny_model(tmp_path / "base")
    folder = tmp_path / "run"
    config = Config(run_dir=str(folder), model={"path": str(base)}, data={"train": ["x"]})
    folder.mkdir()
    save_config(config, folder)
    trained_from(base, folder / "sft/model")
    mark_done(folder, "sft/selected", {"model files": content_digest(base)}, ["sft/model"], 1.0)
    return folder


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("run/sft/model/model.safetensors", "model.safetensors was altered"),
        ("run/resolved.yaml", "resolved.yaml was altered"),
        ("run/state/sft.selected.json", "no record that sft/selected"),
        ("base/model.safetensors", "other files than sft/selected began from"),
    ],
)
def test_what_is_not_as_the_training_left_it_is_not_merged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, named: str
) -> None:
    content = bytearray((tmp_path / file).read_bytes())
    content[-20] ^= 1
    (tmp_path / file).write_bytes(content)
    assert main(["merge", str(run), "--alpha", "0.5", "--out", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_merged_model_and_its_card_are_written(run: Path, tmp_path: Path) -> None:
    assert main(["merge", str(run), "--alpha", "0.5", "--out", str(tmp_path / "out")]) == 0
    start, end, found = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "base", run / "sft/model", tmp_path / "out")
    )
    for name, value in found.items():
        assert torch.equal(value, start[name] + 0.5 * (end[name] - start[name]))
    card = (tmp_path / "out/README.md").read_text()
    assert f"base_model: {tmp_path / 'base'}" in card and "- merge" in card
    assert "base + 0.5 (trained - base)" in card


def test_the_adapter_is_scaled_where_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    (run / "sft/adapter").mkdir()
    (run / "sft/adapter/adapter_config.json").write_text(json.dumps({"lora_alpha": 32.0}))
    out = tmp_path / "out"
    assert main(["merge", str(run), "--alpha", "0.25", "--adapter", "--out", str(out)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 8.0


def test_every_problem_is_told_at_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(run), "--alpha", "1.5", "--out", str(run), "--variant", "select"]
    assert main(words) == 2
    told = capsys.readouterr().err
    for part in ("3 problems", "--alpha", "--out", "selected"):
        assert part in told
    assert main(["merge", str(tmp_path), "--alpha", "1", "--out", str(tmp_path / "o")]) == 2
    assert main(["merge", str(run), "--alpha", "1", "--adapter", "--out", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()
