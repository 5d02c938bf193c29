"""A base in 4 bits is refused with every reason where it cannot be trained on, before any work, and
trained on where there is a GPU: the model written is the one that was trained.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from conftest import REPO, make_tiny_model, write_rows
from grads_ds.cli import main
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.engine import four_bit
from grads_ds.training.four_bit_problems import check_four_bit
from tests.training.test_train import logits, make_config


def four_bits(folder: Path, **sections: Any) -> Config:
    model = {"lora": {"load_in_4bit": True, "r": 4}, "dtype": "bfloat16"}
    return make_config(folder / "base", folder, model=model, **sections)


def whole_config(folder: Path, base: Path, **model: Any) -> Path:
    """A config of one step on few rows; returns its file."""
    write_rows(folder / "rows.jsonl", 8)
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(base), "dtype": "float32"} | model,
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "probe": {"epochs": 1, "batch_size": 8, "micro_batch_size": 4},
        "select": {"budget": 0.5},
        "sft": {"epochs": 1, "batch_size": 4, "learning_rate": 0.01, "adapter": True},
        "deepspeed": "zero2",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def test_without_a_gpu_4_bits_are_refused_with_all_else_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    lora = {"load_in_4bit": True}
    config = whole_config(tmp_path, make_tiny_model(tmp_path / "base"), lora=lora)
    wrong = ["sft.trainer.tf32=true", "data.train=absent.jsonl", "sft.batch_size=3"]
    words = [word for change in wrong for word in ("--set", change)]
    assert main(["run", str(config), "--ranks", "2", *words]) == 2
    told = capsys.readouterr().err
    assert "model.lora.load_in_4bit: wanted a CUDA device for it; found true, no GPU" in told
    assert "pip install 'grads-ds[bitsandbytes]'" in told
    assert "absent.jsonl" in told and "sft.trainer.tf32" in told and "sft.batch_size" in told
    assert told.count("wanted a CUDA device for it; found true") == 2  # of both trainings once
    assert not (tmp_path / "run/prepared").exists()


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"stage": 2}, ""),
        ({"stage": 3}, ""),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights"),
    ],
)
def test_what_deepspeed_would_do_to_4_bit_weights_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: dict[str, Any], named: str
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__spec__=object()))
    config = four_bits(tmp_path)
    Path(config.deepspeed).write_text(json.dumps({"zero_optimization": zero}))
    found = check_four_bit(config)
    assert len(found) == bool(named)
    assert all(named in text and "set deepspeed to zero2 or zero3" in text for text in found)


def test_dora_on_4_bits_is_refused_under_zero_3_and_zero_2_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(__spec__=object()))
    lora = {"load_in_4bit": True, "dora": True}
    config = make_config(tmp_path / "base", tmp_path, model={"lora": lora})
    (told,) = check_four_bit(config)
    assert "stage 0, 1 or 2" in told and "set deepspeed to zero2" in told
    assert check_four_bit(config.model_copy(update={"deepspeed": "zero2"})) == []


def test_4_bits_go_with_no_recording_in_the_training_or_shared_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        four_bits(tmp_path, probe={"record": "during", "epochs": 1}, sft={"sequence_parallel": 2})
    assert [text.split(":")[0] for text in error.value.problems] == [
        "model.lora.load_in_4bit",
        "sft.sequence_parallel",
    ]


def test_modules_trained_whole_and_the_head_are_never_quantized(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", tied=False)
    plain = make_config(base, tmp_path, model={"lora": {"r": 4}})
    assert four_bit.four_bit_loading(plain.model) == {}
    lora = {"load_in_4bit": True, "modules_to_save": ["o_proj"]}
    given = four_bit.four_bit_loading(make_config(base, tmp_path, model={"lora": lora}).model)
    assert set(given["quantization_config"].llm_int8_skip_modules) == {"o_proj", "lm_head"}


@pytest.mark.gpu
@pytest.mark.skipif(
    find_spec("bitsandbytes") is None or not torch.cuda.is_available(),
    reason="needs a CUDA device and bitsandbytes (pip install 'grads-ds[bitsandbytes]')",
)
@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_a_base_in_4_bits_is_trained_on_and_exported_as_it_was(
    tmp_path: Path, deepspeed: str
) -> None:
    train_on_four_bits(tmp_path, deepspeed, os.environ | {"DS_ACCELERATOR": "cuda"})


def train_on_four_bits(folder: Path, deepspeed: str, environment: dict[str, str]) -> None:
    """Every stage on one rank, and what it left."""
    base = make_tiny_model(folder / "base", tied=False)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    config = whole_config(folder, base, lora={"load_in_4bit": True, "r": 4})
    words = ["run", str(config), "--ranks", "1", "--set", f"deepspeed={deepspeed}"]
    done = subprocess.run(
        [sys.executable, "-m", "grads_ds", *words],
        env=environment | {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = Path(load_config(config).run_dir)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    assert (run / "sft/adapter/adapter_model.safetensors").is_file()
    shape = json.loads((run / "sft/model/config.json").read_text())
    assert "quantization_config" not in shape
    trained = AutoModelForCausalLM.from_pretrained(run / "sft/model", dtype=torch.float32)
    assert all(torch.isfinite(weight).all() for weight in trained.parameters())
    # what 4 bits round off is a few hundredths of a weight, and one step moves it further
    assert 0 < (logits(run / "sft/model") - logits(base)).abs().max() < 2
