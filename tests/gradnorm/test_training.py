"""Norms recorded while a model trains are those of each sample's own loss, whatever the step's loss
was, or the step is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradnorm import small_models as models
from gradnorm.test_any_batch import packed
from grads_ds.gradnorm import GradNormRecorder

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 1, 12]


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-tied", "gemma2", "granite", "gpt2", "qwen2-moe", "gpt-oss", "phi", "stablelm"],
)
def test_recording_a_training_step_equals_scoring(name: str) -> None:
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    with recorder:
        (7 * model(**batch).loss).backward()  # 7: a loss scaler, or accumulation
        found = recorder.collect()
    assert max(models.worst(found, true).values()) < 1e-5
    torch.testing.assert_close(found.loss, true.loss, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_the_step_are_untouched_and_steps_follow_each_other(reduction: str) -> None:
    model, twin = models.make_model("llama-tied"), models.make_model("llama-tied")
    recorder = GradNormRecorder(model, "all", loss_reduction=reduction)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    with recorder:
        for step in range(3):
            parts = [
                models.make_batch(LENGTHS, PROMPTS, seed=10 * step + part) for part in range(2)
            ]
            # accumulated over two micro-batches, weighed by the number of targets of both
            for batch in parts:
                items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in parts)
                true = models.truth(recorder, twin, batch, reduction)
                model(**batch, num_items_in_batch=items).loss.backward()
                found = recorder.collect()
                assert max(models.worst(found, true).values()) < 1e-5
            for batch in parts:
                twin(**batch, num_items_in_batch=items).loss.backward()
            for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    model, batch = models.make_model("llama").train(), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with recorder:
        model(**batch).loss.backward()
        assert max(models.worst(recorder.collect(), true).values()) < 1e-5


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_mixed_precision_steps(name: str, fused: bool, backward_inside: bool) -> None:
    """autocast over fp32 weights, as trainers do it: within what bf16 is good for of the fp32
    truth.
    """
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    arguments: dict[str, Any] = {}
    if fused:
        pytest.importorskip("trl.trainer.utils").add_fused_lm_head(model)
        arguments = {"fused_lm_head": True}
    with recorder:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, **arguments).loss
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found = recorder.collect()
    assert max(models.worst(found, true).values()) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        scored = recorder.score(batch)
    assert max(models.worst(scored, true).values()) < 2e-2


def test_packed_rows() -> None:
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    rows = packed(batch, [[0, 1], [2]])
    # the first row, which has no padding
    single = {name: tensor[:1, :22] for name, tensor in rows.items()}
    positions = torch.cat([torch.arange(13), torch.arange(9)])[None]
    single["labels"][0, 13] = -100  # as collators do, since the model would shift over the boundary
    with recorder:
        model(
            input_ids=single["input_ids"],
            labels=single["labels"],
            position_ids=positions,
            use_cache=False,
        ).loss.backward()
        found = recorder.collect()
    for group, norm in found.norms.items():
        torch.testing.assert_close(norm, true.norms[group][:2], rtol=1e-5, atol=0)
    # With a cache, transformers 5.23 lets the samples of a row see each other without a word.
    with recorder, pytest.raises(ValueError, match="use_cache=False"):
        model(
            input_ids=single["input_ids"],
            labels=single["labels"],
            position_ids=positions,
            use_cache=True,
        )


def test_lora_adapters_and_the_frozen_embedding_and_head_beside_them() -> None:
    peft = pytest.importorskip("peft")
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    recorder = GradNormRecorder(adapted, ("lora", "embedding", "lm_head"))
    true = models.truth(recorder, adapted, batch)
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    with recorder:
        adapted(**batch).loss.backward()
        assert max(models.worst(recorder.collect(), true).values()) < 1e-5
    assert all(p.grad is None for n, p in adapted.named_parameters() if "lora_" not in n)


def smoothed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], label_smoothing=0.1
    )


def with_z_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**batch)
    return output.loss + 1e-2 * output.logits.logsumexp(-1).square().mean()


def weighted_tokens(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return (losses * torch.linspace(1, 2, losses.shape[1])).mean()


@pytest.mark.parametrize("loss", [smoothed, with_z_loss, weighted_tokens])
def test_losses_of_another_form_are_refused(loss: Any) -> None:
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    with (
        GradNormRecorder(model) as recorder,
        pytest.raises(RuntimeError, match=r"use score\(\) instead"),
    ):
        loss(model, batch).backward()
        recorder.collect()


def one_row_without_weight(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return (losses.sum(1) * torch.tensor([1.0, 0.0, 1.0, 1.0])).sum()


def test_a_sample_that_the_loss_weighs_by_nothing_has_no_norm_of_zero() -> None:
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    with (
        GradNormRecorder(model) as recorder,
        pytest.raises(RuntimeError, match=r"weighs 1 samples that have targets by 0"),
    ):
        one_row_without_weight(model, batch).backward()
        recorder.collect()


def test_frozen_tables_are_measured_while_others_train() -> None:
    model, batch = models.make_model("gpt2"), models.make_batch(LENGTHS, PROMPTS)
    model.transformer.wpe.requires_grad_(False)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    with recorder:
        model(**batch).loss.backward()
        assert max(models.worst(recorder.collect(), true).values()) < 1e-5
    assert model.transformer.wpe.weight.grad is None


def test_misuse_is_named() -> None:
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model)
    with pytest.raises(RuntimeError, match="with recorder"):
        recorder.collect()
    with recorder:
        with pytest.raises(RuntimeError, match="no backward"):
            recorder.collect()
        model(**batch).loss.backward()
        with pytest.raises(RuntimeError, match="after every backward"):
            model(**batch)
        recorder.collect()
        with torch.no_grad():
            model(**batch)  # evaluation in between is no step
        recorder.score(batch)  # nor is scoring
        with pytest.raises(ValueError, match="labels"):
            model(input_ids=batch["input_ids"])


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "cohere", "gpt2", "phi"])
@pytest.mark.parametrize("adapted", [False, True])
def test_losses_fused_with_the_head_which_make_no_logits(name: str, adapted: bool) -> None:
    """TRL's, made for its trainers: the head is never called as a module."""
    utils = pytest.importorskip("trl.trainer.utils")
    plain, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    model, layers = plain, ("all",)
    if adapted:
        peft = pytest.importorskip("peft")
        targets = "all-linear" if name == "gpt2" else ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        model, layers = peft.get_peft_model(plain, config).eval(), ("lora", "lm_head", "embedding")
    recorder = GradNormRecorder(model, layers)
    true = models.truth(recorder, model, batch)
    utils.add_fused_lm_head(plain)
    with recorder:
        (3 * model(**batch, fused_lm_head=True).loss).backward()
        found = recorder.collect()
        assert max(models.worst(found, true).values()) < 1e-5
        torch.testing.assert_close(found.loss, true.loss, rtol=1e-5, atol=1e-6)
        output = model(**batch, fused_lm_head=True)
        with pytest.raises(RuntimeError, match=r"use score\(\) instead"):
            (output.log_probs * torch.linspace(1, 2, output.log_probs.shape[1])).sum().backward()
