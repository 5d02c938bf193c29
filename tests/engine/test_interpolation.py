"""A model between two: every weight is base + alpha (trained - base) to the bit, tied or not, LoRA
merged or not, in one file or many, with one shard in memory.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from grads_ds.config.errors import UserError
from grads_ds.engine import interpolation, model_folder
from grads_ds.engine.interpolation import blend, interpolate, scale_adapter
from grads_ds.engine.model_folder import save_model
from tests.training.test_train import make_config

QUIET: list[str] = []


def moved(model: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def merged(base: Path, trained: Path, alpha: float, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    interpolate(base, trained, alpha, out, QUIET.append)
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(out).state_dict()
    return state


def in_memory(base: Path, trained: Path, alpha: float) -> dict[str, torch.Tensor]:
    start, end = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (base, trained))
    return {name: start[name] + alpha * (end[name] - start[name]) for name in end}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [2**12, 2**30])
def test_the_merge_is_the_one_in_memory_to_the_bit(
    tmp_path: Path, tied: bool, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(tmp_path / "base", tied=tied)
    monkeypatch.setattr(model_folder, "SHARD_BYTES", shard_bytes)
    config = make_config(base, tmp_path)
    save_model(
        moved(AutoModelForCausalLM.from_pretrained(base)), config, tmp_path / "trained", "its card"
    )
    shards = len(list((tmp_path / "trained").glob("model-*.safetensors")))
    assert (shards > 2) == (shard_bytes == 2**12)
    found = merged(base, tmp_path / "trained", 0.3, tmp_path / "out")
    assert same(found, in_memory(base, tmp_path / "trained", 0.3))
    names = {f.name for f in (tmp_path / "trained").iterdir()} - {"README.md"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj"])
def test_merged_lora_also_where_it_unties_the_embeddings(tmp_path: Path, target: str) -> None:
    base = make_tiny_model(tmp_path / "base", tied=True)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=[target])
    )
    moved(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            with torch.no_grad():
                parameter.copy_(_of(base, name))
    save_model(adapted, make_config(base, tmp_path), tmp_path / "trained")
    found = merged(base, tmp_path / "trained", 0.25, tmp_path / "out")
    assert same(found, in_memory(base, tmp_path / "trained", 0.25))
    untied = not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert untied == (target != "q_proj")


def _of(base: Path, name: str) -> torch.Tensor:
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    plain = name.replace("base_model.model.", "").replace(".base_layer.", ".")
    return state[plain]


def test_a_scaled_adapter_is_the_merged_model_at_the_same_alpha(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", alpha_pattern={"q_proj": 2}),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    scale_adapter(tmp_path / "adapter", 0.5, tmp_path / "out")
    scaled = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "out"
    ).merge_and_unload()
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    end = adapted.merge_and_unload().state_dict()
    for name, value in scaled.state_dict().items():
        wanted = start[name] + 0.5 * (end[name] - start[name])
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)
    assert not torch.equal(
        end["model.layers.0.self_attn.q_proj.weight"],
        start["model.layers.0.self_attn.q_proj.weight"],
    )


def test_an_adapter_that_does_not_go_with_its_scale_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    settings = {"lora_alpha": 8, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="use_dora, modules_to_save, bias"):
        scale_adapter(tmp_path / "adapter", 0.5, tmp_path)


def test_half_precision_is_rounded_once() -> None:
    base = torch.tensor([1.0, 3.0], dtype=torch.float32)
    trained = torch.tensor([1.0078125, 2.984375], dtype=torch.bfloat16)
    wanted = (base + 0.5 * (trained.float() - base)).bfloat16()
    found = blend(base, trained, 0.5)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    counts = torch.tensor([3])
    assert blend(torch.tensor([1]), counts, 0.5) is counts


def test_models_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    other = make_tiny_model(tmp_path / "other", layers=3)
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] = torch.ones(5)
    save_file(state, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError) as caught:
        interpolate(base, other, 0.5, tmp_path / "out", QUIET.append)
    assert "model.layers.2" in caught.value.problems[0]
    assert "model.norm.weight [5] for [32]" in caught.value.problems[1]
    assert not list((tmp_path / "out").iterdir())
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match="as safetensors"):
        interpolate(base, other, 0.5, tmp_path / "out", QUIET.append)


def test_no_shard_is_held_when_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("base", "trained"):
        (tmp_path / side).mkdir()
        for shard in range(4):
            value = torch.full((64, 64), float(shard + (side == "trained")))
            file = tmp_path / side / f"model-{shard}.safetensors"
            save_file({f"w{shard}": value}, file, {"format": "pt"})
    (tmp_path / "out").mkdir()
    made: list[weakref.ref[torch.Tensor]] = []

    def kept_weakly(*arguments: Any) -> torch.Tensor:
        tensors = [*arguments[:2], blend(*arguments)]
        made.extend(map(weakref.ref, tensors))
        return tensors[-1]

    monkeypatch.setattr(interpolation, "blend", kept_weakly)
    held = []
    folders = tmp_path / "base", tmp_path / "trained", 0.5, tmp_path / "out"
    interpolate(*folders, lambda what: held.append(sum(ref() is not None for ref in made)))
    assert held == [0, 0, 0, 0] and len(made) == 12
    assert load_file(tmp_path / "out/model-3.safetensors")["w3"][0, 0] == 3.5
