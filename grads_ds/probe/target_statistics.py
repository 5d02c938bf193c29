"""What a model's distribution at the target tokens says of each sample: pure tensor functions.

Shapes: S samples, N target positions (sorted by sample), T of one sample, V vocabulary, D width.
With p_t = softmax(z_t), z_t = f(W h_t + bias), y_t the target and
g_t = f'(.) (p_t - onehot(y_t)) / T the gradient of the sample's mean loss at the head's output:
    loss       mean_t -log p_t[y_t]                   entropy  mean_t H_t = -sum_v p_tv log p_tv
    conflict   mean_t max(0, loss_t - H_t) (1 - H_t / log V): confident, and contradicted
    error      mean_t ||p_t - onehot(y_t)||           (EL2N)
    norm       ||G||, G = sum_t g_t h_t^T             (the head weight's own gradient)
    row_norm   sum_v f_v ||G[v]||^2                   (row Fisher, f given per row)
    ||G[v]||^2 = sum_{t,s} g_tv g_sv (h_t . h_s)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.head import DEFAULT_BUDGET
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform


@dataclass(frozen=True)
class TargetStatistics:
    """Float64 [S] each, 0 for a sample without targets; `norm` and `row_norm` are NaN without a
    weight. `row_squares` [V]: the sum over samples of ||G[v]||^2, when asked for.
    """

    loss: Tensor
    entropy: Tensor
    conflict: Tensor
    error: Tensor
    norm: Tensor
    row_norm: Tensor
    row_squares: Tensor | None


def target_statistics(
    rows_ND: Tensor,
    weight_VD: Tensor | None,
    bias_V: Tensor | None,
    target_ids_N: Tensor,
    slices: list[tuple[int, int]],
    transform: LogitTransform,
    *,
    row_weights_V: Tensor | None = None,
    want_row_squares: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> TargetStatistics:
    """Equations at the top of this file.

    Args:
        rows_ND: the head's input at the target positions; the logits [N, V] without a weight.
        weight_VD, bias_V: the head's parameters, whole; None where the head is no matrix.
        target_ids_N: the token that each position should predict.
        slices: each sample's [start, stop) of N.
        transform: what the model does to its logits.
        row_weights_V: f of row_norm; None leaves row_norm NaN.
        want_row_squares: whether to add up ||G[v]||^2.
        budget: logits held at a time; a larger sample goes over the vocabulary twice.
    """
    dtype = torch.float64 if rows_ND.dtype == torch.float64 else torch.float32
    rows_ND = rows_ND.to(dtype)
    if weight_VD is not None and weight_VD.numel() <= budget:
        weight_VD = weight_VD.to(dtype)  # once, not for every sample
    vocabulary = rows_ND.shape[1] if weight_VD is None else len(weight_VD)
    out = {
        name: torch.zeros(len(slices), dtype=torch.float64, device=rows_ND.device)
        for name in ("loss", "entropy", "conflict", "error", "norm", "row_norm")
    }
    squares_V = torch.zeros(vocabulary, dtype=torch.float64, device=rows_ND.device)

    def logits(h_TD: Tensor, first: int, last: int) -> Tensor:
        z_Tc = (
            h_TD[:, first:last].clone()
            if weight_VD is None
            else (h_TD @ weight_VD[first:last].to(dtype).T)
        )
        if bias_V is not None:
            z_Tc += bias_V[first:last].to(dtype)
        return transform.apply(z_Tc)

    for sample, (start, stop) in enumerate(slices):
        count = stop - start
        if not count:
            continue
        h_TD, y_T = rows_ND[start:stop], target_ids_N[start:stop]
        chunk = max(1, min(vocabulary, budget // count))
        pieces = [(first, min(vocabulary, first + chunk)) for first in range(0, vocabulary, chunk)]
        # the normaliser; a vocabulary of one piece keeps its logits for the second look
        normaliser_T = h_TD.new_full((count,), -math.inf)
        target_T = h_TD.new_zeros(count)
        for first, last in pieces:
            z_Tc = logits(h_TD, first, last)
            normaliser_T = torch.logaddexp(normaliser_T, z_Tc.logsumexp(-1))
            here = ((y_T >= first) & (y_T < last)).nonzero()[:, 0]
            target_T[here] = z_Tc[here, y_T[here] - first]
        entropy_T, error_T = h_TD.new_zeros(count), h_TD.new_zeros(count)
        gram_TT, weighted_TT = h_TD.new_zeros(count, count), h_TD.new_zeros(count, count)
        inputs_TT = h_TD @ h_TD.T
        # the distribution, the error vectors and their products
        for first, last in pieces:
            if len(pieces) > 1:
                z_Tc = logits(h_TD, first, last)
            p_Tc = (z_Tc - normaliser_T[:, None]).exp_()
            entropy_T += torch.special.entr(p_Tc).sum(-1)
            here = ((y_T >= first) & (y_T < last)).nonzero()[:, 0]
            p_Tc[here, y_T[here] - first] -= 1
            error_T += p_Tc.square().sum(-1)
            if weight_VD is None:
                continue
            g_Tc = transform.backward(p_Tc, z_Tc) / count
            gram_TT += g_Tc @ g_Tc.T
            if row_weights_V is not None:
                weighted_TT += (g_Tc * row_weights_V[first:last].to(dtype)) @ g_Tc.T
            if want_row_squares:
                squares_V[first:last] += ((inputs_TT @ g_Tc) * g_Tc).sum(0).clamp_min(0).double()
        loss_T, entropy_T = (normaliser_T - target_T).double(), entropy_T.double()
        out["loss"][sample] = loss_T.mean()
        out["entropy"][sample] = entropy_T.mean()
        confidence_T = 1 - entropy_T / math.log(vocabulary)
        out["conflict"][sample] = ((loss_T - entropy_T).clamp_min(0) * confidence_T).mean()
        out["error"][sample] = error_T.double().sqrt().mean()
        out["norm"][sample] = (gram_TT * inputs_TT).sum(dtype=torch.float64).clamp_min(0).sqrt()
        out["row_norm"][sample] = (weighted_TT * inputs_TT).sum(dtype=torch.float64).clamp_min(0)
    if weight_VD is None:
        out["norm"].fill_(math.nan)
    if weight_VD is None or row_weights_V is None:
        out["row_norm"].fill_(math.nan)
    return TargetStatistics(**out, row_squares=squares_V if want_row_squares else None)
