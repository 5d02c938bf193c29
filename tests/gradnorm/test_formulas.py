"""Each formula alone against the gradient it stands for, on drawn shapes, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_ds.gradnorm.formulas import embedding, linear, norm
from grads_ds.gradnorm.formulas.head import head_pass
from grads_ds.gradnorm.formulas.head_sums import HeadReference, Wanted
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 9), st.integers(1, 9))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SIZES, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_linear_forms_agree_with_the_gradient(sizes: tuple[int, int, int, int], seed: int) -> None:
    samples, length, inputs, outputs = sizes
    acts, grads = (
        draw(samples, length, inputs, seed=seed),
        draw(samples, length, outputs, seed=seed + 1),
    )
    true = torch.stack([(g.T @ a).square().sum() for a, g in zip(acts, grads, strict=True)])
    for form in (linear.gram_norm_squared, linear.direct_norm_squared, linear.weight_norm_squared):
        torch.testing.assert_close(form(acts, grads), true, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        linear.bias_norm_squared(grads), grads.sum(1).square().sum(-1), rtol=1e-9, atol=1e-12
    )


def test_gram_of_shared_activations_is_the_same_and_notices_other_activations() -> None:
    shared = linear.ActsGram()
    for seed in (0, 0, 1):
        acts = draw(2, 70, 5, seed=seed)
        for outputs in (3, 8):
            grads = draw(2, 70, outputs, seed=7)
            expected = linear.direct_norm_squared(acts, grads)
            torch.testing.assert_close(
                linear.gram_norm_squared(acts, grads, shared), expected, rtol=1e-9, atol=0
            )
        acts *= 2  # changed in place, at the same address
        torch.testing.assert_close(
            linear.gram_norm_squared(acts, grads, shared), 4 * expected, rtol=1e-9, atol=0
        )


def test_direct_form_by_rows_and_samples_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    acts, grads = draw(5, 6, 4), draw(5, 6, 7, seed=1)
    expected = linear.direct_norm_squared(acts, grads)
    monkeypatch.setattr(linear, "_DIRECT_BYTES", 8 * 4 * 3)
    torch.testing.assert_close(linear.direct_norm_squared(acts, grads), expected)


def test_cancelling_tokens_keep_five_digits_in_fp32() -> None:
    acts, grads = draw(2, 200, 64), draw(2, 200, 64, seed=1)
    acts[0, 100:], grads[0, 100:] = acts[0, :100], -grads[0, :100] * (1 + 1e-3)
    acts, grads = acts.float(), grads.float()
    true = linear.direct_norm_squared(acts.double(), grads.double()).sqrt()
    found = linear.gram_norm_squared(acts, grads).sqrt()
    assert float(((found - true).abs() / true).max()) < 1e-5


@given(SIZES, st.integers(0, 99), st.one_of(st.none(), st.integers(0, 4)))
@settings(max_examples=40, deadline=None)
def test_embedding_is_a_segment_sum_and_leaves_the_padding_row_out(
    sizes: tuple[int, int, int, int], seed: int, pad: int | None
) -> None:
    samples, length, width, rows = sizes
    ids = torch.randint(0, 5, (samples, length), generator=torch.Generator().manual_seed(seed))
    grads, other = draw(samples, length, width, seed=seed), draw(5, width, seed=rows)
    for sample in range(samples):
        table = torch.zeros(5, width, dtype=torch.float64, requires_grad=True)
        torch.nn.functional.embedding(ids[sample], table, padding_idx=pad).backward(grads[sample])
        assert table.grad is not None
        found = embedding.embedding_norm_squared(ids, grads, pad)[sample]
        torch.testing.assert_close(found, table.grad.square().sum(), rtol=1e-9, atol=1e-12)
        inner = embedding.embedding_inner(ids, grads, other, pad)[sample]
        torch.testing.assert_close(inner, (table.grad * other).sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_normalisation_weight_and_bias(centred: bool, shape: tuple[int, ...]) -> None:
    acts, grads = draw(3, 5, 2, 3) if len(shape) == 2 else draw(3, 5, 4, 6), None
    grads = torch.randn_like(acts)
    scale = norm.scale_gradient(acts, grads, len(shape), 1e-5, centred)
    weight = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    for sample in range(3):
        width = shape[-1:]
        normed = (
            torch.nn.functional.layer_norm(acts[sample], width)
            if centred
            else torch.nn.functional.rms_norm(acts[sample], width, eps=1e-5)
        )
        expected = torch.autograd.grad((normed * weight * grads[sample]).sum(), weight)[0]
        torch.testing.assert_close(scale[sample], expected)
        torch.testing.assert_close(
            norm.shift_gradient(grads, len(shape))[sample],
            grads[sample].flatten(0, -len(shape) - 1).sum(0),
        )


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.sampled_from([10**9, 60, 7, 1]),
    st.booleans(),
    st.sampled_from(
        [LogitTransform(), LogitTransform(0.3), LogitTransform(1.0, 1.5), LogitTransform(2.0, 1.5)]
    ),
    st.integers(2, 11),
)
@settings(max_examples=60, deadline=None)
def test_head_pass_is_autograd_of_the_weighted_cross_entropy(
    counts: list[int], budget: int, biased: bool, transform: LogitTransform, width: int
) -> None:
    vocabulary, rows = 17, sum(counts)
    hidden, weight = (
        draw(rows, width).requires_grad_(),
        draw(vocabulary, width, seed=1).requires_grad_(),
    )
    bias = draw(vocabulary, seed=2).requires_grad_() if biased else None
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    row_ids = torch.randint(
        0, vocabulary, (len(counts), 6), generator=torch.Generator().manual_seed(4)
    )
    slices = [(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
    weights = torch.tensor([1 / max(1, count) for count in counts], dtype=torch.float64)
    summed = torch.zeros(vocabulary, width, dtype=torch.float64)
    references = tuple(
        HeadReference(
            draw(vocabulary, width, seed=seed), draw(vocabulary, seed=9) if biased else None
        )
        for seed in (5, 6)
    )
    with torch.no_grad():
        found = head_pass(
            hidden,
            weight,
            bias,
            targets,
            slices,
            weights,
            transform=transform,
            wanted=Wanted(row_ids_SL=row_ids, references=references, gradient_VD=summed),
            budget=budget,
        )
    assert found.dh is not None and found.rows is not None and found.inner is not None
    total = torch.zeros_like(summed)
    for sample, (start, stop) in enumerate(slices):
        logits = transform.scale * (hidden[start:stop] @ weight.T + (0 if bias is None else bias))
        logits = (
            logits if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)
        )
        loss = (
            torch.nn.functional.cross_entropy(logits, targets[start:stop], reduction="sum")
            * weights[sample]
        )
        wanted = [hidden, weight] + ([] if bias is None else [bias])
        grads = torch.autograd.grad(loss, wanted)
        torch.testing.assert_close(found.loss[sample], loss.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            found.weight_norm_squared[sample], grads[1].square().sum(), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            found.dh[start:stop], grads[0][start:stop], rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            found.rows[sample], grads[1][row_ids[sample]], rtol=1e-9, atol=1e-12
        )
        for inner_S, one in zip(found.inner, references, strict=True):
            true = (grads[1] * one.weight_VD).sum()
            if one.bias_V is not None:
                true = true + (grads[2] * one.bias_V).sum()
            torch.testing.assert_close(inner_S[sample], true, rtol=1e-9, atol=1e-12)
        if bias is not None:
            torch.testing.assert_close(
                found.bias_norm_squared[sample], grads[2].square().sum(), rtol=1e-9, atol=1e-12
            )
        total += grads[1]
    torch.testing.assert_close(summed, total, rtol=1e-9, atol=1e-12)


def error_norms(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitTransform,
    budget: int,
) -> torch.Tensor:
    wanted = Wanted(norm=False, dh=False, error_norms=True)
    slices, weights = [(0, len(targets))], torch.ones(1, dtype=torch.float64)
    found = head_pass(
        hidden,
        weight,
        bias,
        targets,
        slices,
        weights,
        transform=transform,
        wanted=wanted,
        budget=budget,
    )
    assert found.error_norms is not None
    return found.error_norms


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_error_vectors_where_the_model_is_all_but_certain(scale: float) -> None:
    """In single precision 1 - p would drown; the value of double precision is kept."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(9, 16, generator=generator),
        scale * torch.randn(50, 16, generator=generator),
    )
    logits = hidden.double() @ weight.double().T
    targets = logits.argmax(-1)
    others = logits.softmax(-1).scatter(1, targets[:, None], 0.0)
    true = (others.square().sum(-1) + others.sum(-1).square()).sqrt()
    for budget in (9 * 11, 2**20):
        found = error_norms(hidden, weight, None, targets, LogitTransform(), budget)
        torch.testing.assert_close(found, true, rtol=1e-3, atol=0)


@pytest.mark.parametrize("budget", [1, 50, 2**20])
def test_error_vectors_in_pieces_with_a_soft_cap(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator).double() for size in ((7, 5), (23, 5), (23,))
    )
    targets = torch.randint(0, 23, (7,), generator=generator)
    found = error_norms(hidden, weight, bias, targets, LogitTransform(0.5, 3.0), budget)
    logits = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0)
    expected = (logits.softmax(-1) - torch.nn.functional.one_hot(targets, 23)).norm(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
