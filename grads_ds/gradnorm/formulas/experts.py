"""Per-sample gradient norms of experts whose weights are one tensor each, [E, ...]. Pure tensor
functions.

Expert e computes y = D_e gate(U_e x + b_e) + c_e for the tokens routed to it, and the layer adds up
w_ne y over a token's experts. With G_n the gradient of the layer's output at token n, g_y = w_ne
G_n, g_u = gate'(u)^T D_e^T g_y, each expert is two linear layers over its own tokens (linear.py),
and since experts are disjoint rows of the tensor their squares add up.
Shapes: N tokens, K experts per token, P pairs of the two, S samples, L pairs of one sample at one
expert, H width, I inner width, O = 2 I where the gate has two inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.linear import bias_norm_squared, weight_norm_squared


@dataclass(frozen=True)
class ExpertWeights:
    """up [E, O, H], down [E, H, I], and their biases [E, O] and [E, H], if any. gate: [n, O] ->
    [n, I].
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert, int64 [P] each, and what its output weighs, [P] (None: 1).
    rows: the row of the layer's input that the pair reads, [P].
    """

    rows: Tensor
    experts: Tensor
    weights: Tensor | None


def expert_outputs(hidden: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """The weighted output of every pair, [P, H]: what the layer adds up. For comparison."""
    outputs = hidden.new_zeros(len(routing.rows), weights.down.shape[1])
    for expert in range(len(weights.up)):
        here = (routing.experts == expert).nonzero()[:, 0]
        u = _up(hidden[routing.rows[here]], expert, weights)
        y = weights.gate(u) @ weights.down[expert].T
        if weights.down_bias is not None:
            y = y + weights.down_bias[expert]
        outputs[here] = y if routing.weights is None else y * routing.weights[here, None]
    return outputs


def expert_squares(
    hidden: Tensor,
    grads_PH: Tensor,
    owners_P: Tensor,
    samples: int,
    routing: Routing,
    weights: ExpertWeights,
) -> dict[str, Tensor]:
    """Squared norms, float64 [S], of "up", "down" and, where they are, "up_bias" and "down_bias".

    Args:
        hidden: the layer's input, rows of width H.
        grads_PH: the gradient of the layer's output at each pair's token.
        owners_P: the sample of each pair, -1 for padding.
        samples: S.
        routing: the pairs.
        weights: of all experts.
    """
    experts = len(weights.up)
    # pairs by expert and sample; those of padding and of experts elsewhere stand at the end
    own_P = (owners_P >= 0) & (routing.experts < experts)
    keys_P = torch.where(own_P, routing.experts * samples + owners_P, experts * samples)
    order_P = torch.argsort(keys_P, stable=True)
    counts = torch.bincount(keys_P, minlength=experts * samples + 1)[:-1].tolist()
    zero_S = torch.zeros(samples, dtype=torch.float64, device=hidden.device)
    totals = {"up": zero_S, "down": zero_S.clone()}
    if weights.up_bias is not None:
        totals |= {"up_bias": zero_S.clone(), "down_bias": zero_S.clone()}
    start = 0
    for expert in range(experts):
        sizes = counts[expert * samples : (expert + 1) * samples]
        pairs_n = order_P[start : start + sum(sizes)]
        start += sum(sizes)
        if not len(pairs_n):
            continue
        # forward and backward of this expert's own tokens
        x_nH, g_nH = hidden[routing.rows[pairs_n]], grads_PH[pairs_n]
        if routing.weights is not None:
            g_nH = g_nH * routing.weights[pairs_n, None].to(g_nH.dtype)
        with torch.enable_grad():
            u_nO = _up(x_nH, expert, weights).detach().requires_grad_(True)
            a_nI = weights.gate(u_nO)
        g_nI = g_nH.to(a_nI.dtype) @ weights.down[expert].to(a_nI.dtype)
        (g_nO,) = torch.autograd.grad(a_nI, u_nO, g_nI)
        # two linear layers
        present = [sample for sample, size in enumerate(sizes) if size]
        place = _places([size for size in sizes if size], hidden.device)
        x_sLH, u_sLO, a_sLI, y_sLH = (
            _by_sample(rows, place) for rows in (x_nH, g_nO, a_nI.detach(), g_nH)
        )
        totals["up"][present] += weight_norm_squared(x_sLH, u_sLO)
        totals["down"][present] += weight_norm_squared(a_sLI, y_sLH)
        if weights.up_bias is not None:
            totals["up_bias"][present] += bias_norm_squared(u_sLO)
            totals["down_bias"][present] += bias_norm_squared(y_sLH)
    return totals


def _up(x_nH: Tensor, expert: int, weights: ExpertWeights) -> Tensor:
    u_nO = x_nH @ weights.up[expert].T
    return u_nO if weights.up_bias is None else u_nO + weights.up_bias[expert]


def _places(sizes: list[int], device: torch.device) -> Tensor:
    """int64 [s, L]: where each sample's rows stand, one after another; -1 behind the last."""
    longest = max(sizes)
    lengths = torch.tensor(sizes)
    place = torch.arange(longest) + (lengths.cumsum(0) - lengths)[:, None]
    return place.masked_fill(torch.arange(longest) >= lengths[:, None], -1).to(device)


def _by_sample(rows_nx: Tensor, place_sL: Tensor) -> Tensor:
    gathered = rows_nx[place_sL.clamp_min(0)]
    return gathered.masked_fill((place_sL < 0)[..., None], 0)
