"""Every group of every architecture equals one float64 backward per sample within 1e-5, by formulas
alone.
"""

from __future__ import annotations

import pytest
import torch

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.scoring import one_sample

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 0, 12]


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_all_groups_are_exact_without_the_one_sample_path(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> None:
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(one_sample, "one_sample_norms", refused)
    model = models.make_model(name)
    batch = models.make_batch(LENGTHS, PROMPTS)
    recording = GradNormRecorder(model, "all")
    found, true = recording.score(batch), models.truth(recording, model, batch)
    assert max(models.worst(found, true).values()) < 1e-5
    assert float((found.loss - true.loss).abs().max()) < 1e-5
    assert found.num_tokens.tolist() == LENGTHS
    assert found.num_target_tokens.tolist() == [10, 7, 5, 1]
    assert all(float(norm.min()) > 0 for norm in found.norms.values()), (
        "a group that is nowhere zero was left out"
    )


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_parameter_has_a_group_and_a_rule(name: str) -> None:
    model = models.make_model(name)
    plan = GradNormRecorder(model, "all").plan
    covered = {parameter for site in plan.sites for parameter in site.parameters.values()}
    assert covered == set(plan.groups) == {parameter for parameter, _ in model.named_parameters()}
    assert {"embedding", "attention", "mlp"} <= set(plan.groups.values())


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt2", "mixtral", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_stay_within_two_percent_of_their_own_float64_truth(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model = models.make_model(name).to(device, dtype)
    batch = {key: tensor.to(device) for key, tensor in models.make_batch(LENGTHS, PROMPTS).items()}
    recording = GradNormRecorder(model, "all")
    found, true = recording.score(batch), models.truth(recording, model, batch)
    errors = models.worst(found, true)
    assert max(errors.values()) < 2e-2, errors
