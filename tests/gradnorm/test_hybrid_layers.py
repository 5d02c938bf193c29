"""Layers of hybrids with recurrences: gated norms and depthwise convolutions are measured by
formula, and what a module keeps from its last call is an input of the next.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradnorm import custom_models as custom
from gradnorm import small_models as models
from gradnorm.test_any_batch import packed
from gradnorm.test_uses import LENGTHS, PROMPTS, both_exact
from grads_ds.gradnorm import GradNormRecorder

WIDTH = custom.WIDTH


class Gated(nn.Module):
    """A gated norm: the gate before or behind the norm, in groups, its weight an offset from 1."""

    def __init__(self, first: bool, groups: int, offset: float) -> None:
        super().__init__()
        self.first, self.groups, self.offset = first, groups, offset
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        opened = 1.0 if gate is None else F.silu(gate)
        x = (x * opened if self.first else x).unflatten(-1, (self.groups, -1))
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(-2)
        return (self.offset + self.weight) * x * (1.0 if self.first else opened)


class GatedBody(nn.Module):
    def __init__(self, norm: nn.Module, heads: bool = False, gated: bool = True) -> None:
        super().__init__()
        self.norm, self.heads, self.gated = norm, heads, gated
        self.before = nn.Linear(WIDTH, WIDTH * (3 if heads else 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        if self.heads:  # [B * T * heads, W], as Qwen3-Next calls its norm
            y = y.reshape(-1, WIDTH)
        y = self.norm(y, torch.cos(y)) if self.gated else self.norm(y)
        return x + y.reshape(*x.shape[:2], -1, WIDTH).sum(2)


class Convolved(nn.Module):
    """Causal, by padding on both sides and cutting the end off."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x.mT)[..., : x.shape[1]]).mT


class Remembers(nn.Module):
    """Keeps its last call's state, which the next call multiplies by zero (RecurrentGemma)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros_like(x[:, 0]) if self.state is None else 0 * self.state
        self.state = (start + x[:, -1]).detach()
        return torch.sin(self.gain * x) + start[:, None].detach()


def rules(recorder: GradNormRecorder, name: str) -> set[str]:
    trial = list(recorder.scorer.trials.values())[-1]
    return {site.rule for site in trial.plan.sites if name in site.parameters.values()}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "norm", [(True, 1, 0.0), (False, 4, 0.0), (False, 1, 1.0)], ids=["before", "groups", "offset"]
)
def test_gated_norms_of_any_form_are_measured_by_formula(norm: Any, heads: bool) -> None:
    model = custom.Wrapped(GatedBody(Gated(*norm), heads))
    batch = models.make_batch(LENGTHS, PROMPTS)
    both_exact(model, batch)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    assert rules(recorder, "body.norm.weight") == {"scale"}


@pytest.mark.parametrize("heads", [False, True])
def test_gated_norms_are_exact_where_rows_hold_several_samples(heads: bool) -> None:
    model = custom.Wrapped(GatedBody(Gated(True, 4, 1.0), heads))
    batch = models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    found = recorder.score(packed(batch, [[0, 1], [2, 3]]))
    assert max(models.worst(found, true).values()) < 1e-5
    assert rules(recorder, "body.norm.weight") == {"scale"}


def test_a_gated_norm_called_without_its_gate_is_exact() -> None:
    model = custom.Wrapped(GatedBody(Gated(True, 1, 0.0), gated=False))
    both_exact(model, models.make_batch(LENGTHS, PROMPTS))


@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_convolutions_are_measured_by_formula(bias: bool) -> None:
    model, batch = custom.Wrapped(Convolved(bias)), models.make_batch(LENGTHS, PROMPTS)
    both_exact(model, batch)
    both_exact(model, {key: tensor[:1] for key, tensor in batch.items()})
    both_exact(model, models.make_batch([4, 3, 4, 2], [1, 1, 1, 0]))  # as many rows as tokens
    recorder = GradNormRecorder(model, "all")
    recorder.score(batch)
    assert rules(recorder, "body.conv.weight") == {"convolution"}


def test_a_state_kept_from_the_last_call_is_no_part_of_a_batch() -> None:
    """Batches of another size follow each other, and the state is as the user left it."""
    model = custom.Wrapped(Remembers())
    recorder = GradNormRecorder(model, "all")
    for lengths, prompts in ((LENGTHS, PROMPTS), ([7, 5], [1, 2])):
        batch = models.make_batch(lengths, prompts)
        true = models.truth(recorder, model, batch)
        assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
        assert model.body.state is None
    both_exact(model, models.make_batch(LENGTHS, PROMPTS))
