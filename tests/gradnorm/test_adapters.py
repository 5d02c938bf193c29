"""PEFT's adapters of any recipe, prompts and prefixes among them, are exact in scoring and while
training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradnorm import small_models as models
from gradnorm.test_uses import LENGTHS, PROMPTS, both_exact
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.measure import module_alone

PEFT: dict[str, tuple[str, dict[str, Any], Any]] = {
    "head saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ("embedding", "lm_head"),
    ),
    "head adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}, "all"),
    "tied table adapted": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"]},
        ("lora", "embedding", "lm_head"),
    ),
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, ("lora",)),
    "upper layer": (
        "llama",
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        ("lora",),
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_adapters_of_any_recipe_are_exact(case: str) -> None:
    peft = pytest.importorskip("peft")
    name, settings, layers = PEFT[case]
    config = peft.LoraConfig(r=3, init_lora_weights=False, **settings)
    torch.manual_seed(1)
    model = peft.get_peft_model(models.make_model(name), config).eval()
    both_exact(model, models.make_batch(LENGTHS, PROMPTS), layers)


def test_other_kinds_of_adapters_are_exact() -> None:
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["k_proj", "down_proj"]}
    for config in (
        peft.IA3Config(feedforward_modules=["down_proj"], **targets),
        peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
        peft.LoraConfig(r=3, init_lora_weights=False, use_dora=True, **targets),
        peft.LoHaConfig(r=3, init_weights=False, **targets),
        peft.OFTConfig(r=0, oft_block_size=4, init_weights=False, target_modules=["q_proj"]),
    ):
        model = peft.get_peft_model(models.make_model("llama"), config).eval()
        module_alone._NOT_AT_ONCE.clear()
        both_exact(model, models.make_batch(LENGTHS, PROMPTS))
        # in one run for all samples, not in one for each; LoHa's own autograd function forbids it
        one_by_one = {kind.__module__ for kind in module_alone._NOT_AT_ONCE}
        assert one_by_one <= {"peft.tuners.loha.layer"}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_prompts_and_prefixes_in_front_of_every_row_are_exact(name: str) -> None:
    peft = pytest.importorskip("peft")
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    for config in (
        peft.PromptTuningConfig(**common),
        peft.PromptEncoderConfig(**common, encoder_hidden_size=16),
        peft.PrefixTuningConfig(**common),
        peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=16),
    ):
        torch.manual_seed(1)
        base = models.make_model(name, num_key_value_heads=4)  # PEFT reads it off any config
        model = peft.get_peft_model(base, config).eval()
        batch = models.make_batch(LENGTHS, PROMPTS)
        both_exact(model, batch)
        both_exact(model, {key: tensor[:1] for key, tensor in batch.items()})
        recorder = GradNormRecorder(model, "all", tokens=True)
        found = recorder.score(batch)
        assert found.num_tokens.tolist() == LENGTHS
        assert not any(trial.plan.one_by_one for trial in recorder.scorer.trials.values())
        assert found.tokens is not None and found.tokens.loss.shape == batch["labels"].shape
        mean_B = found.tokens.loss.nan_to_num().sum(1) / found.num_target_tokens
        torch.testing.assert_close(mean_B, found.loss)


def test_adapters_of_single_parameters_are_exact() -> None:
    """PEFT's target_parameters: the weight is a parametrization while its module runs."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, init_lora_weights=False, target_modules=[], target_parameters=["mlp.gate_proj.weight"]
    )
    model = peft.get_peft_model(models.make_model("llama"), config).eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    both_exact(model, models.make_batch(LENGTHS, PROMPTS))
    assert kinds == {name: type(module) for name, module in model.named_modules()}


def test_adapters_asked_for_where_there_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted adapters"):
        GradNormRecorder(models.make_model("llama"), ("lora",))


def test_the_backward_stops_at_the_lowest_layer_asked_for() -> None:
    peft = pytest.importorskip("peft")
    name, settings, layers = PEFT["upper layer"]
    config = peft.LoraConfig(r=3, init_lora_weights=False, **settings)
    model = peft.get_peft_model(models.make_model(name), config).eval()
    below: list[int] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_full_backward_hook(lambda *arguments: below.append(1))
    batch = models.make_batch(LENGTHS, PROMPTS)
    GradNormRecorder(model, layers, check=False).score(batch)
    assert not below
    GradNormRecorder(model, ("embedding",), check=False).score(batch)
    assert below
