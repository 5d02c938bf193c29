"""What a distribution says at the target tokens equals its definition, in pieces and whole."""

from __future__ import annotations

import math

import pytest
import torch

from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.probe.target_statistics import target_statistics

SLICES = [(0, 4), (4, 4), (4, 9)]
VOCABULARY, WIDTH = 23, 5


def head(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((9, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    rows, weight, bias = (torch.randn(*size, generator=generator).double() for size in sizes)
    return rows, weight, bias, torch.randint(0, VOCABULARY, (9,), generator=generator)


@pytest.mark.parametrize("budget", [1, 60, 2**20])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)])
def test_statistics_are_their_definitions(budget: int, transform: LogitTransform) -> None:
    rows, weight, bias, targets = head()
    fisher = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    found = target_statistics(
        rows,
        weight,
        bias,
        targets,
        SLICES,
        transform,
        row_weights_V=fisher,
        want_row_squares=True,
        budget=budget,
    )
    squares = torch.zeros(VOCABULARY).double()
    for sample, (start, stop) in enumerate(SLICES):
        w = weight.clone().requires_grad_()
        logits = transform.scale * (rows[start:stop] @ w.T + bias)
        if transform.cap is not None:
            logits = transform.cap * torch.tanh(logits / transform.cap)
        if start == stop:
            assert found.loss[sample] == found.norm[sample] == found.conflict[sample] == 0
            continue
        logp = logits.log_softmax(-1)
        loss = -logp.gather(1, targets[start:stop, None])[:, 0]
        (gradient,) = torch.autograd.grad(loss.mean(), w, retain_graph=True)
        p, loss = logp.exp().detach(), loss.detach()
        entropy = -(p * logp.detach()).sum(-1)
        conflict = ((loss - entropy).clamp_min(0) * (1 - entropy / math.log(VOCABULARY))).mean()
        error = (p - torch.nn.functional.one_hot(targets[start:stop], VOCABULARY)).norm(dim=-1)
        squares += (by_row := gradient.square().sum(-1))
        for name, value in {
            "loss": loss.mean(),
            "entropy": entropy.mean(),
            "conflict": conflict,
            "error": error.mean(),
            "norm": gradient.norm(),
            "row_norm": (fisher * by_row).sum(),
        }.items():
            torch.testing.assert_close(getattr(found, name)[sample], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.row_squares, squares, rtol=1e-9, atol=1e-12)


def test_without_a_weight_the_rows_are_the_logits() -> None:
    rows, weight, bias, targets = head()
    with_head = target_statistics(rows, weight, bias, targets, SLICES, LogitTransform())
    of_logits = target_statistics(
        rows @ weight.T + bias, None, None, targets, SLICES, LogitTransform()
    )
    for name in ("loss", "entropy", "conflict", "error"):
        torch.testing.assert_close(getattr(with_head, name), getattr(of_logits, name))
    assert of_logits.norm.isnan().all() and of_logits.row_norm.isnan().all()
