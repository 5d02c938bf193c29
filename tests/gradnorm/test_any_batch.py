"""A sample's norms are its own: the same alone, beside any others, padded on either side, packed,
and recomputed.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.batch_layout import read_layout, unpad

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 0, 12]


def packed(batch: dict[str, torch.Tensor], rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The samples of a padded batch, several to a row."""
    samples = unpad(batch)
    length = max(sum(len(samples[i][0]) for i in row) for row in rows) + 2
    result = {
        name: torch.full((len(rows), length), fill)
        for name, fill in (("input_ids", 0), ("labels", -100), ("segment_ids", -1))
    }
    for place, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row):
            ids, labels = samples[sample]
            here = slice(start, start + len(ids))
            (
                result["input_ids"][place, here],
                result["labels"][place, here],
                result["segment_ids"][place, here],
            ) = (ids, labels, number)
            start += len(ids)
    return result


@pytest.mark.parametrize(
    "name", ["llama-tied", "gemma3", "gpt2", "bloom", "opt", "mixtral", "gpt-oss", "deepseek-v3"]
)
@pytest.mark.parametrize("how", ["left", "packed", "reentrant", "non-reentrant", "eager"])
def test_norms_do_not_depend_on_how_the_batch_is_laid_out(name: str, how: str) -> None:
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    true = models.truth(GradNormRecorder(model, "all"), model, batch)
    if how == "left":
        batch = models.make_batch(LENGTHS, PROMPTS, side="left")
    elif how == "packed":
        batch = packed(batch, [[0, 1], [2, 3]])
    elif how == "eager":
        model.set_attn_implementation("eager")
    else:
        model.train()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": how == "reentrant"}
        )
    found = GradNormRecorder(model, "all").score(batch)
    assert max(models.worst(found, true).values()) < 1e-5
    assert found.num_tokens.tolist() == LENGTHS
    assert model.training == ("reentrant" in how)


@pytest.mark.gpu
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs flash-attention and a CUDA device"
)
def test_flash_attention() -> None:
    model = models.make_model("llama", head_dim=32, attn_implementation="flash_attention_2").to(
        "cuda", torch.bfloat16
    )
    batch = {name: tensor.cuda() for name, tensor in models.make_batch(LENGTHS, PROMPTS).items()}
    whole = models.make_model("llama", head_dim=32).to("cuda", torch.bfloat16)
    recorder = GradNormRecorder(model, "all")
    assert (
        max(models.worst(recorder.score(batch), models.truth(recorder, whole, batch)).values())
        < 2e-2
    )


def test_each_sample_alone_and_in_other_company() -> None:
    model = models.make_model("llama")
    recorder, batch = GradNormRecorder(model, "all"), models.make_batch(LENGTHS, PROMPTS)
    together = recorder.score(batch)
    for company in ([0], [1], [3, 1], [2, 0, 1]):
        found = recorder.score({name: tensor[company] for name, tensor in batch.items()})
        for group, norm in found.norms.items():
            torch.testing.assert_close(norm, together.norms[group][company], rtol=1e-5, atol=0)


@given(
    st.lists(st.tuples(st.integers(2, 20), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(0, 5),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["llama", "llama-tied"]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([10**6, 200]),
    st.fixed_dictionaries(
        {
            "hidden_size": st.sampled_from([8, 24, 40]),
            "intermediate_size": st.integers(1, 50),
            "num_hidden_layers": st.integers(1, 3),
            "vocab_size": st.integers(models.VOCAB, 99),
        }
    ),
)
@settings(max_examples=25, deadline=None)
def test_drawn_shapes_lengths_and_masks(
    rows: list[tuple[int, int]],
    seed: int,
    side: str,
    name: str,
    reduction: str,
    budget: int,
    shape: dict[str, int],
) -> None:
    model = models.make_model(name, **shape)
    batch = models.make_batch(
        [length for length, _ in rows], [prompt for _, prompt in rows], seed, side
    )
    recorder = GradNormRecorder(model, "all", loss_reduction=reduction, head_budget=budget)
    found, true = recorder.score(batch), models.truth(recorder, model, batch, reduction)
    assert max(models.worst(found, true).values()) < 1e-5
    torch.testing.assert_close(found.loss, true.loss, rtol=1e-5, atol=1e-6)


def test_a_sample_without_targets_has_norm_zero_and_says_so() -> None:
    model, batch = models.make_model("llama-tied"), models.make_batch([8, 7], [2, 7])
    found = GradNormRecorder(model, "all").score(batch)
    assert found.num_target_tokens.tolist() == [6, 0]
    assert all(float(norm[1]) == 0 < float(norm[0]) for norm in found.norms.values())
    batch["labels"][:] = -100
    assert all(
        float(norm.sum()) == 0
        for norm in GradNormRecorder(model, "all").score(batch).norms.values()
    )


def test_scoring_leaves_the_model_as_it_was() -> None:
    model, batch = models.make_model("mixtral").train(), models.make_batch(LENGTHS, PROMPTS)
    model.lm_head.weight.requires_grad_(False)
    model(**batch).loss.backward()
    before = copy.deepcopy(
        {name: (p.grad, p.requires_grad, p.detach()) for name, p in model.named_parameters()}
    )
    keys = {name: sorted(vars(module)) for name, module in model.named_modules()}
    GradNormRecorder(model, "all").score(batch)
    for name, parameter in model.named_parameters():
        grad, required, value = before[name]
        assert parameter.requires_grad == required and torch.equal(parameter, value)
        assert (grad is None) == (parameter.grad is None) and (
            grad is None or torch.equal(grad, parameter.grad)
        )
    assert keys == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert all(
        not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules()
    )


def test_head_alone_runs_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    both = GradNormRecorder(model, ("embedding", "lm_head")).score(batch)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a backward was run")

    monkeypatch.setattr(torch.autograd, "backward", refused)
    found = GradNormRecorder(model, ("lm_head",)).score(batch)
    torch.testing.assert_close(found.norms["lm_head"], both.norms["lm_head"], rtol=1e-6, atol=0)


def test_bad_batches_and_layers_are_refused_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    with pytest.raises(ValueError, match="labels must be -100 at padding"):
        read_layout({**batch, "labels": batch["input_ids"]})
    with pytest.raises(ValueError, match="shape of input_ids"):
        read_layout({**batch, "attention_mask": torch.ones(4, 1, 13, 13)})
    with pytest.raises(ValueError, match=r"any of embedding.*found \['heads'\]"):
        GradNormRecorder(model, ("heads",))
    with pytest.raises(ValueError, match="loss_reduction"):
        GradNormRecorder(model, loss_reduction="none")
    with pytest.raises(ValueError, match=r"torch\.compile"):
        GradNormRecorder(torch.compile(model))
    model.model.layers[0].compile()
    with pytest.raises(ValueError, match=r"torch\.compile"):
        GradNormRecorder(model)
