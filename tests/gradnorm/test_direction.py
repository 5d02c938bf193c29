"""Inner products and cosines with a reference gradient equal those of the whole gradients, in the
pass that gives the norms.
"""

from __future__ import annotations

import pytest
import torch

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.reference import reference_gradients

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 1, 12]
CASES = [
    ("llama", ("embedding", "lm_head")),
    ("llama-tied", ("embedding", "lm_head")),
    ("llama", ("lm_head",)),
    ("gemma2", "all"),
    ("gpt2", "all"),
    ("phi", "all"),
]


@pytest.mark.parametrize(("name", "layers"), CASES)
def test_direction_against_an_anchor_set(name: str, layers: object) -> None:
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    anchors = [models.make_batch([9, 5], [2, 1], seed=5), models.make_batch([7], [0], seed=6)]
    recorder = GradNormRecorder(model, layers)  # type: ignore[arg-type]
    anchor = recorder.mean_gradient(anchors)
    per_sample = [grads for b in anchors for _, grads in reference_gradients(model, b)]
    for parameter, gradient in anchor.items():
        true = torch.stack([grads[parameter] for grads in per_sample]).mean(0)
        torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-7)
    recorder.set_reference(anchor)
    found = recorder.score(batch)
    samples = [grads for _, grads in reference_gradients(model, batch)]
    for group in found.inner_products:
        key = "embedding" if recorder.plan.tied and group == "lm_head" else group
        names = [parameter for parameter, g in recorder.plan.groups.items() if g == key]
        inner = torch.stack(
            [
                sum(((g[n] * anchor[n].double()).sum() for n in names), torch.zeros(()))
                for g in samples
            ]
        )
        size = torch.stack(
            [torch.stack([g[n].square().sum() for n in names]).sum().sqrt() for g in samples]
        )
        reference = torch.stack([anchor[n].double().square().sum() for n in names]).sum().sqrt()
        torch.testing.assert_close(
            found.cosines[group], inner / size / reference, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            found.inner_products[group], found.cosines[group] * size * reference, rtol=1e-4, atol=0
        )
    assert set(found.inner_products) >= set(recorder.plan.requested) & {"embedding", "lm_head"}


def test_direction_while_training_is_the_same_for_any_scale_of_the_loss() -> None:
    model, batch = models.make_model("llama-tied"), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model)
    recorder.set_reference(recorder.mean_gradient([models.make_batch([9, 5], [2, 1], seed=5)]))
    true = recorder.score(batch)
    with recorder:
        (3 * model(**batch).loss).backward()
        found = recorder.collect()
    for group, inner in true.inner_products.items():
        torch.testing.assert_close(found.inner_products[group], inner, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.cosines[group], true.cosines[group], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers", "head_budget"),
    [
        ("llama-tied", ("embedding", "lm_head"), 2**25),
        ("llama-tied", ("embedding", "lm_head"), 300),
        ("phi", "all", 2**25),
        ("gpt2", "all", 2**25),
        ("qwen3-moe", "all", 2**25),
    ],
)
def test_one_pass_against_two_references_is_two_passes_to_the_bit(
    name: str, layers: object, head_budget: int
) -> None:
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, layers, head_budget=head_budget)  # type: ignore[arg-type]
    first = recorder.mean_gradient([models.make_batch([9, 5], [2, 1], seed=5)])
    second = recorder.mean_gradient([models.make_batch([7], [0], seed=6)])
    recorder.set_references({"one": first, "other": second})
    together = recorder.score(batch)
    with recorder:
        (3 * model(**batch).loss).backward()
        training = recorder.collect()
    assert set(together.directions) == {"one", "other"}
    for key, reference in (("one", first), ("other", second)):
        recorder.set_reference(reference)
        apart = recorder.score(batch)
        assert set(apart.inner_products) == set(together.directions[key].inner_products)
        for group, inner in apart.inner_products.items():
            assert torch.equal(together.directions[key].inner_products[group], inner)
            assert torch.equal(together.directions[key].cosines[group], apart.cosines[group])
            while_training = training.directions[key].cosines[group]
            torch.testing.assert_close(while_training, apart.cosines[group], rtol=0, atol=1e-5)
    assert not torch.allclose(*(d.cosines["embedding"] for d in together.directions.values()))


def test_references_of_different_parameters_are_refused() -> None:
    recorder = GradNormRecorder(models.make_model("llama"))
    whole = recorder.mean_gradient([models.make_batch([7], [0])])
    head = {name: of for name, of in whole.items() if recorder.plan.groups[name] == "lm_head"}
    with pytest.raises(ValueError, match=r"same parameters; found whole: 2, head: 1 parameters"):
        recorder.set_references({"whole": whole, "head": head})


def test_a_reference_in_part_is_refused() -> None:
    recorder = GradNormRecorder(models.make_model("llama"), "all")
    with pytest.raises(ValueError, match=r"every parameter of a group; missing: .*self_attn"):
        recorder.set_reference({"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)})
    with pytest.raises(ValueError, match="not recorded: nowhere"):
        recorder.set_reference({"nowhere": torch.zeros(1)})
