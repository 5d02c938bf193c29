"""What a distribution says at the target tokens equals its definition, in pieces and whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from grads_ds.gradnorm.formulas.head import head_pass
from grads_ds.gradnorm.formulas.head_sums import Wanted
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.probe import target_statistics as module
from grads_ds.probe.target_statistics import (
    Asked,
    TargetStatistics,
    TargetSums,
    statistics_of_logits,
)

SLICES = [(0, 4), (4, 4), (4, 9)]
VOCABULARY, WIDTH = 23, 5


def head(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((9, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    rows, weight, bias = (torch.randn(*size, generator=generator).double() for size in sizes)
    return rows, weight, bias, torch.randint(0, VOCABULARY, (9,), generator=generator)


def shown(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    transform: LogitTransform,
    asked: Asked,
    budget: int = 2**20,
    **wanted: bool,
) -> TargetStatistics:
    """What a pass of the head shows to the statistics."""
    sums = TargetSums(SLICES, VOCABULARY, transform, asked, rows.device)
    passed = head_pass(
        rows,
        weight,
        bias,
        targets,
        SLICES,
        torch.tensor([1 / max(1, stop - start) for start, stop in SLICES]).double(),
        transform=transform,
        wanted=Wanted(**({"norm": False, "dh": False} | wanted), watch=sums),
        budget=budget,
    )
    assert passed.watch is sums
    torch.testing.assert_close(passed.loss, sums.result().loss)  # the pass is as it was
    return sums.result()


@pytest.mark.parametrize("budget", [1, 60, 2**20])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)])
def test_statistics_are_their_definitions(budget: int, transform: LogitTransform) -> None:
    rows, weight, bias, targets = head()
    fisher = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    asked = Asked(norm=True, row_weights_V=fisher, row_squares=True)
    found = shown(rows, weight, bias, targets, transform, asked, budget)
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


@pytest.mark.parametrize("budget", [30, 2**20])
def test_looking_on_changes_nothing_of_the_pass_nor_of_what_is_seen(budget: int) -> None:
    """Whether the pass makes gradients too, and in however many rows they are looked at."""
    rows, weight, bias, targets = head()
    asked, transform = Asked(norm=True), LogitTransform(0.5, 3.0)
    alone = shown(rows, weight, bias, targets, transform, asked, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 1)
        beside = shown(rows, weight, bias, targets, transform, asked, budget, norm=True, dh=True)
    for name in ("loss", "entropy", "conflict", "error", "norm"):
        torch.testing.assert_close(getattr(alone, name), getattr(beside, name))
    wanted = Wanted()
    weights = torch.ones(len(SLICES)).double()
    given = (rows, weight, bias, targets, SLICES, weights)
    plain = head_pass(*given, transform=transform, wanted=wanted, budget=budget)
    sums = TargetSums(SLICES, VOCABULARY, transform, asked, rows.device)
    seen = head_pass(*given, transform=transform, wanted=replace(wanted, watch=sums), budget=budget)
    assert torch.equal(plain.dh, seen.dh)
    assert torch.equal(plain.weight_norm_squared, seen.weight_norm_squared)
    counts = torch.tensor([stop - start for start, stop in SLICES])
    torch.testing.assert_close((sums.result().norm * counts) ** 2, seen.weight_norm_squared)


def test_without_a_head_of_its_own_the_rows_are_the_logits() -> None:
    rows, weight, bias, targets = head()
    with_head = shown(rows, weight, bias, targets, LogitTransform(), Asked(norm=True))
    of_logits = statistics_of_logits(rows @ weight.T + bias, targets, SLICES)
    for name in ("loss", "entropy", "conflict", "error"):
        torch.testing.assert_close(getattr(with_head, name), getattr(of_logits, name))
    assert of_logits.norm.isnan().all() and of_logits.row_norm.isnan().all()
