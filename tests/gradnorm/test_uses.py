"""A parameter's uses decide how it is measured, not the module that owns it: every unusual use is
exact in scoring, and exact or refused by name while training.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from gradnorm import custom_models as custom
from gradnorm import small_models as models
from gradnorm.test_any_batch import packed
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.trial import guard

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 1, 12]
SQUARE = ([4, 3, 4, 2], [1, 1, 1, 0])  # as many rows as tokens


def recorded(model: nn.Module, batch: dict[str, torch.Tensor], layers: Any = "all") -> Any:
    recorder = GradNormRecorder(model, layers)
    with recorder:
        model(**batch).loss.backward()  # type: ignore[operator]
        found = recorder.collect()
    model.zero_grad()
    return found


def both_exact(model: nn.Module, batch: dict[str, torch.Tensor], layers: Any = "all") -> None:
    recorder = GradNormRecorder(model, layers)
    true = models.truth(recorder, model, batch)
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    assert max(models.worst(recorded(model, batch, layers), true).values()) < 1e-5


@pytest.mark.parametrize("shape", [(LENGTHS, PROMPTS), SQUARE])
@pytest.mark.parametrize(
    "body",
    [
        custom.OneWeightInTwoModules,
        custom.CalledTwice,
        custom.AlsoThroughAFunction,
        custom.TimeFirst,
        custom.TimeFirstFlat,
        custom.ParameterHandedOut,
        custom.NormWithASecondInput,
    ],
)
def test_unusual_uses_are_exact_scoring_and_training(body: Any, shape: Any) -> None:
    both_exact(custom.Wrapped(body()), models.make_batch(*shape))


def test_samples_that_see_each_other_are_scored_apart_and_not_trained() -> None:
    model, batch = custom.Wrapped(custom.SamplesMixed()), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    with pytest.raises(ValueError, match="see each other"):
        recorded(model, batch)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_experts_in_one_tensor_are_measured_by_formula(name: str, layout: str) -> None:
    """Routed with and without biases, transposed, and repeated for every expert."""
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    if layout == "packed":
        batch = packed(batch, [[0, 1], [2, 3]])
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    # of rows that were taken apart for models whose packed samples see each other, the last
    trial = list(recorder.scorer.trials.values())[-1]
    rules = {site.rule for site in trial.plan.sites if "experts" in site.name.rpartition(".")[2]}
    assert rules == {"experts"}


def test_a_wrong_rule_is_found_out_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm layer that is measured by the wrong formula, as one unknown here would be."""
    from grads_ds.gradnorm.formulas import norm

    monkeypatch.setattr(
        norm, "scale_gradient", lambda acts, grads, dims, eps, centred: 2 * acts.sum(1)
    )
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    with pytest.warns(UserWarning, match="differ from a backward of their own"):
        found = recorder.score(batch)
    assert max(models.worst(found, true).values()) < 1e-5
    with pytest.raises(RuntimeError, match=r"layernorm.weight came out as .* use score\(\)"):
        recorded(model, batch)
    unchecked = GradNormRecorder(model, "all", check=False).score(batch)
    assert models.worst(unchecked, true)["norm"] > 1


def test_the_check_runs_once_for_each_kind_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    own = guard._own_backward
    monkeypatch.setattr(guard, "_own_backward", lambda *a: checked.append(1) or own(*a))
    recorder = GradNormRecorder(models.make_model("llama"), "all")
    for lengths in (LENGTHS, [7, 9, 5], [7], [8], [3, 3, 2]):
        recorder.score(models.make_batch(lengths, [1] * len(lengths)))
    assert len(checked) == 3  # several rows; one row; as many rows as tokens


def test_left_padding_is_scored_as_right_and_refused_where_it_matters() -> None:
    left = models.make_batch(LENGTHS, PROMPTS, side="left")
    both_exact(models.make_model("llama"), left)
    model = models.make_model("gpt2")  # learned positions, which start at the padding
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, left)
    assert max(models.worst(recorder.score(left), true).values()) < 1e-5
    with pytest.raises(ValueError, match="pass position_ids that count from each sample's first"):
        recorded(model, left)


def test_a_mask_with_a_hole_is_scored_without_it_and_not_trained() -> None:
    model, batch = models.make_model("llama"), models.make_batch(LENGTHS, PROMPTS)
    batch["attention_mask"][0, 5], batch["labels"][0, 5] = 0, -100
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    with pytest.raises(ValueError, match="padding between a sample's tokens"):
        recorded(model, batch)


def test_float64_integer_parameters_inference_mode_and_deep_copies() -> None:
    batch = models.make_batch(LENGTHS, PROMPTS)
    model = models.make_model("llama").double()
    model.register_parameter(
        "quantised", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    )
    both_exact(model, batch)
    recorder = GradNormRecorder(model)
    expected = recorder.score(batch).norms["lm_head"]
    with torch.inference_mode():
        same = {name: tensor.clone() for name, tensor in batch.items()}
        torch.testing.assert_close(recorder.score(same).norms["lm_head"], expected)
    with recorder, warnings.catch_warnings():
        loss = model(**batch).loss
        copy.deepcopy(model)(**batch).loss.backward()  # is no step of the model's own
        loss.backward()
        torch.testing.assert_close(recorder.collect().norms["lm_head"], expected)


def test_losses_and_norms_token_by_token() -> None:
    batch = models.make_batch(LENGTHS, PROMPTS, side="left")
    model = models.make_model("llama")
    found = GradNormRecorder(model, tokens=True).score(batch)
    assert found.tokens is not None
    loss_BT, head_BT = found.tokens.loss, found.tokens.norms["lm_head"]
    for row, length in enumerate(LENGTHS):
        ids = batch["input_ids"][row, -length:]
        twin = copy.deepcopy(model).double()
        logits = twin(input_ids=ids[None]).logits[0]
        for t in range(1, length):
            place = 13 - length + t
            if batch["labels"][row, place] == -100:
                assert loss_BT[row, place].isnan()
                continue
            loss = nn.functional.cross_entropy(logits[t - 1], ids[t])
            (grad,) = torch.autograd.grad(loss, twin.lm_head.weight, retain_graph=True)
            torch.testing.assert_close(loss_BT[row, place], loss.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(head_BT[row, place], grad.norm(), rtol=1e-5, atol=1e-7)
    mean_B = loss_BT.nan_to_num().sum(1) / found.num_target_tokens
    torch.testing.assert_close(mean_B, found.loss)
    assert bool((found.tokens.norms["embedding"][batch["attention_mask"] == 0] == 0).all())
