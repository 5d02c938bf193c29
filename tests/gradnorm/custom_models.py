"""A small causal model around any body, and bodies that use their parameters in unusual ways."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH = 61, 16


class Wrapped(nn.Module):
    """Embedding, body [B, T, D] -> [B, T, D], head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(VOCAB, WIDTH), body
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> object:
        logits = self.head(self.body(self.embed(input_ids).cumsum(1) * 0.3))
        if labels is None:
            return SimpleNamespace(logits=logits)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        return SimpleNamespace(logits=logits, loss=loss)


class OneWeightInTwoModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + x


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(torch.tanh(self.layer(self.norm(x))))) + x


class AlsoThroughAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight) + x


class TimeFirst(nn.Module):
    """Runs its layer on [T, B, D], or on [T * B, D]."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.layer, self.flat = nn.Linear(WIDTH, WIDTH), flat

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        rows = turned.reshape(-1, WIDTH) if self.flat else turned
        return torch.tanh(self.layer(rows)).reshape(turned.shape).transpose(0, 1) + x


class TimeFirstFlat(TimeFirst):
    def __init__(self) -> None:
        super().__init__(flat=True)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self) -> Tensor:
        return self.weight


class ParameterHandedOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.holder())


class GatedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class NormWithASecondInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = GatedNorm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, torch.cos(x)) + x


class SamplesMixed(nn.Module):
    """Takes the mean over the batch away: no sample has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x - x.mean(0, keepdim=True))) + x
