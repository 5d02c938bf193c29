"""The LM head at the target positions only: losses, the head's own gradient norms and dL/dh in one
pass. Pure tensor functions.

Shapes: S samples, N target positions (sorted by sample), V vocabulary, D width, L positions of the
longest sample. For target position t of sample b, weight w_b and logits z_t = f(W h_t + bias) with
an elementwise f:
    loss_b = sum_t w_b (logsumexp(z_t) - z_t[y_t]),   g_t = w_b (softmax(z_t) - onehot(y_t)) f'(.),
                                                      dL/dh_t = W^T g_t
    ||dL/dW||^2 = sum_{t,s} (h_t . h_s)(g_t . g_s),   dL/dbias = sum_t g_t
No [B, T, V] tensor exists: samples are taken in groups whose N x V logits fit `budget` elements; a
sample that does not fit alone is computed over vocabulary chunks, twice (once for the normaliser,
once for g).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.linear import (
    accumulate,
    bias_norm_squared,
    direct_norm_squared,
    gram_norm_squared,
)

DEFAULT_BUDGET = 2**25


@dataclass(frozen=True)
class LogitTransform:
    """f(z) = cap * tanh(scale * z / cap), or scale * z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """f, written into `logits` where that is possible."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def backward(self, grads: Tensor, transformed: Tensor) -> Tensor:
        """f'(.) * grads, given f's own output."""
        if self.cap is not None:
            grads = grads * (1 - (transformed / self.cap).square())
        return grads * self.scale if self.scale != 1.0 else grads


@dataclass(frozen=True)
class HeadPass:
    """loss [S] (weighted sum, float64), weight and bias norm squares [S] (float64), dh [N, D], rows
    [S, L, D] for tied tables, inner [S]: inner product of the head's gradient with a reference.
    """

    loss: Tensor
    weight_norm_squared: Tensor
    bias_norm_squared: Tensor
    dh: Tensor | None
    rows: Tensor | None
    inner: Tensor | None


@dataclass(frozen=True)
class SequenceShards:
    """For samples whose sequences several ranks share: squared norms of gradients summed over those
    ranks, and the largest number of targets that any of them has in one sample.
    """

    weight: Callable[[Tensor, Tensor], Tensor]
    bias: Callable[[Tensor], Tensor]
    longest: int


def head_pass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_ids_N: Tensor,
    slices: list[tuple[int, int]],
    sample_weights_S: Tensor,
    *,
    transform: LogitTransform,
    want_norm: bool = True,
    want_dh: bool = True,
    row_ids_SL: Tensor | None = None,
    reference_VD: Tensor | None = None,
    gradient_VD: Tensor | None = None,
    bias_reference_V: Tensor | None = None,
    bias_gradient_V: Tensor | None = None,
    budget: int = DEFAULT_BUDGET,
    spread: SequenceShards | None = None,
) -> HeadPass:
    """One pass over the head. slices: each sample's [start, stop) of N. Equations at the top of
    this file.

    row_ids_SL asks for rows x_t of each sample's head gradient (tied tables); reference_VD (and
    bias_reference_V) for the inner product with them per sample; gradient_VD and bias_gradient_V,
    if given, have the batch's summed gradient added to them. spread: samples' sequences are shared
    by several ranks; norms are then this rank's shares. Accumulates in fp32 (float64 for float64).
    """
    num_samples, width = len(slices), hidden_ND.shape[1]
    hidden_ND = accumulate(hidden_ND)
    double = {"dtype": torch.float64, "device": hidden_ND.device}
    loss, norm, bias_norm, inner = (torch.zeros(num_samples, **double) for _ in range(4))
    dh_ND = torch.zeros_like(hidden_ND) if want_dh else None
    rows_SLD = None if row_ids_SL is None else hidden_ND.new_zeros(*row_ids_SL.shape, width)
    vocabulary = weight_VD.shape[0]
    for group in (
        [[b] for b in range(num_samples)] if spread else _groups(slices, vocabulary, budget)
    ):
        start, stop = slices[group[0]][0], slices[group[-1]][1]
        local = [(slices[b][0] - start, slices[b][1] - start) for b in group]
        h_nD, y_n = hidden_ND[start:stop], target_ids_N[start:stop]
        w_n = torch.cat(
            [sample_weights_S[b].expand(slices[b][1] - slices[b][0]) for b in group]
        ).to(h_nD.dtype)
        # ranks that share a sample take the same chunks
        rows = spread.longest if spread else stop - start
        chunk = vocabulary if rows * vocabulary <= budget else max(1, budget // rows)
        want_grads = want_norm or want_dh
        if chunk >= vocabulary:
            z_nc = _logits(h_nD, accumulate(weight_VD), bias_V, 0, transform)
            loss_n, whole = _softmax(z_nc, y_n, w_n, keep=transform.cap is not None)
        else:
            whole = None
            normaliser_n, loss_n = _normaliser(h_nD, weight_VD, bias_V, y_n, transform, chunk)
        weighted_n = loss_n.double() * w_n.double()
        for (a, z), b in zip(local, group, strict=True):
            loss[b] = weighted_n[a:z].sum()
        if not want_grads:
            continue
        grams = (
            {b: h_nD.new_zeros(z - a, z - a) for (a, z), b in zip(local, group, strict=True)}
            if chunk < vocabulary and not spread
            else {}
        )
        for first in range(0, vocabulary, chunk):
            w_cD = accumulate(weight_VD[first : first + chunk])
            inside = ((y_n >= first) & (y_n < first + len(w_cD))).nonzero()[:, 0]
            if whole is not None:
                g_nc = whole  # softmax, and weighted, already
            else:
                z_nc = _logits(h_nD, w_cD, bias_V, first, transform)
                g_nc = (z_nc - normaliser_n[:, None]).exp_().mul_(w_n[:, None])
            g_nc[inside, y_n[inside] - first] -= w_n[inside]
            g_nc = transform.backward(g_nc, z_nc if transform.cap is not None else g_nc)
            if dh_ND is not None:
                dh_ND[start:stop].addmm_(g_nc, w_cD)
            if gradient_VD is not None:
                gradient_VD[first : first + chunk].addmm_(
                    g_nc.T.to(gradient_VD.dtype), h_nD.to(gradient_VD.dtype)
                )
            if bias_gradient_V is not None:
                bias_gradient_V[first : first + chunk] += g_nc.sum(0)
            if reference_VD is not None:
                projected_n = (
                    g_nc @ reference_VD[first : first + chunk].to(g_nc.dtype) * h_nD
                ).sum(-1, dtype=torch.float64)
                if bias_reference_V is not None:
                    projected_n += (
                        g_nc @ bias_reference_V[first : first + chunk].to(g_nc.dtype)
                    ).double()
            for (a, z), b in zip(local, group, strict=True):
                g_1tc, h_1tD = g_nc[None, a:z], h_nD[None, a:z]
                if reference_VD is not None:
                    inner[b] += projected_n[a:z].sum()
                if want_norm and bias_V is not None:
                    bias_norm[b] += (spread.bias(g_1tc) if spread else bias_norm_squared(g_1tc))[0]
                if rows_SLD is not None and row_ids_SL is not None:
                    ids_L = row_ids_SL[b]
                    here = ((ids_L >= first) & (ids_L < first + len(w_cD))).nonzero()[:, 0]
                    rows_SLD[b, here] = g_nc[a:z][:, ids_L[here] - first].T @ h_nD[a:z]
                if not want_norm:
                    continue
                if spread:
                    norm[b] += spread.weight(h_1tD, g_1tc)[0]
                elif (z - a) >= width:  # direct form: disjoint vocabulary rows, squares add up
                    norm[b] += direct_norm_squared(h_1tD, g_1tc)[0]
                elif grams:
                    grams[b].addmm_(g_nc[a:z], g_nc[a:z].T)
                else:
                    norm[b] = gram_norm_squared(h_1tD, g_1tc)[0]
        for (a, z), b in zip(local, group, strict=True):
            if want_norm and grams and z - a < width:
                norm[b] = (
                    (grams[b] * (h_nD[a:z] @ h_nD[a:z].T)).sum(dtype=torch.float64).clamp_min(0)
                )
    return HeadPass(
        loss, norm, bias_norm, dh_ND, rows_SLD, inner if reference_VD is not None else None
    )


def _groups(slices: list[tuple[int, int]], vocabulary: int, budget: int) -> Iterator[list[int]]:
    """Neighbouring samples whose logits fit the budget together; a sample that is too large stands
    alone.
    """
    group: list[int] = []
    rows = 0
    for sample, (start, stop) in enumerate(slices):
        if stop == start:
            continue
        if group and (rows + stop - start) * vocabulary > budget:
            yield group
            group, rows = [], 0
        group.append(sample)
        rows += stop - start
    if group:
        yield group


def _logits(
    h_nD: Tensor, w_cD: Tensor, bias_V: Tensor | None, first: int, transform: LogitTransform
) -> Tensor:
    logits_nc = h_nD @ w_cD.T
    if bias_V is not None:
        logits_nc += bias_V[first : first + len(w_cD)]
    return transform.apply(logits_nc)


def _softmax(z_nV: Tensor, y_n: Tensor, w_n: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and w * softmax(z), in as few passes as it takes; overwrites z
    unless `keep`.
    """
    at_target_n = z_nV.gather(1, y_n[:, None])[:, 0]
    peak_n = z_nV.amax(-1)
    p_nV = (z_nV - peak_n[:, None] if keep else z_nV.sub_(peak_n[:, None])).exp_()
    sum_n = p_nV.sum(-1)
    return sum_n.log() + peak_n - at_target_n, p_nV.mul_((w_n / sum_n)[:, None])


def _normaliser(
    h_nD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    y_n: Tensor,
    transform: LogitTransform,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """log-sum-exp of each row and its cross-entropy, over chunks of the vocabulary."""
    running_n = h_nD.new_full((len(h_nD),), -math.inf)
    at_target_n = h_nD.new_zeros(len(h_nD))
    for first in range(0, weight_VD.shape[0], chunk):
        w_cD = accumulate(weight_VD[first : first + chunk])
        z_nc = _logits(h_nD, w_cD, bias_V, first, transform)
        running_n = torch.logaddexp(running_n, z_nc.logsumexp(-1))
        inside = ((y_n >= first) & (y_n < first + len(w_cD))).nonzero()[:, 0]
        at_target_n[inside] = z_nc[inside, y_n[inside] - first]
    return running_n, running_n - at_target_n
