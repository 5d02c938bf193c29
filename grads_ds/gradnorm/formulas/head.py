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

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.error_norm import ErrorNorms, chunk_columns
from grads_ds.gradnorm.formulas.head_sums import (
    HeadPass,
    HeadSums,
    SequenceShards,
    TargetGroup,
    Wanted,
)
from grads_ds.gradnorm.formulas.linear import (
    bfloat16_factors,
    direct_norm_squared,
    weight_norm_squared,
)
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform

DEFAULT_BUDGET = 2**25


def head_pass(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_ids_N: Tensor,
    slices: list[tuple[int, int]],
    sample_weights_S: Tensor,
    *,
    transform: LogitTransform,
    wanted: Wanted,
    budget: int = DEFAULT_BUDGET,
    shards: SequenceShards | None = None,
) -> HeadPass:
    """One pass over the head. Equations at the top of this file. Accumulates in fp32 (float64 for
    float64).

    Args:
        hidden_ND: the head's input at the target positions, sorted by sample.
        weight_VD, bias_V: the head.
        target_ids_N: the tokens to predict.
        slices: each sample's [start, stop) of N.
        sample_weights_S: what each target of a sample weighs.
        transform: what the model does to its logits.
        wanted: what to give beside the losses.
        budget: the largest number of logits held at a time.
        shards: the samples' sequences are shared by several ranks; norms are then this rank's part.
    """
    vocabulary = weight_VD.shape[0]
    sums = HeadSums(hidden_ND, weight_VD, bias_V, slices, wanted, shards)
    alone = [[sample] for sample in range(len(slices))]
    for group in alone if shards else _groups(slices, vocabulary, budget):
        start, stop = slices[group[0]][0], slices[group[-1]][1]
        part = TargetGroup(
            group,
            slice(start, stop),
            sums.hidden_ND[start:stop],
            target_ids_N[start:stop],
            torch.cat([sample_weights_S[b].expand(slices[b][1] - slices[b][0]) for b in group]).to(
                sums.hidden_ND.dtype
            ),
        )
        # ranks that share a sample take the same chunks
        rows = shards.longest if shards else stop - start
        if rows * vocabulary <= budget:
            _whole_vocabulary(sums, part, transform)
        else:
            _by_chunks(sums, part, transform, max(1, budget // rows))
    return sums.result()


def _whole_vocabulary(sums: HeadSums, part: TargetGroup, transform: LogitTransform) -> None:
    """A part whose logits are held at once."""
    wanted, y_n, w_n = sums.wanted, part.y_n, part.w_n
    z_nV = _logits(sums, part, 0, len(sums.weight_VD), transform)
    errors = ErrorNorms(y_n, z_nV) if wanted.error_norms else None
    if errors is not None:
        errors.add(z_nV, 0)
    if wanted.watch is not None:
        wanted.watch.see(part, z_nV, 0, None)
    loss_n, g_nV = _softmax(z_nV, y_n, w_n, keep=transform.cap is not None)
    sums.add_losses(part, loss_n, errors)
    if not (wanted.norm or wanted.dh):
        return
    g_nV[torch.arange(len(y_n), device=y_n.device), y_n] -= w_n
    g_nV = transform.backward(g_nV, z_nV if transform.cap is not None else g_nV)
    sums.add_gradients(part, g_nV, 0)
    for b, a, z in sums.of(part) if wanted.norm else ():
        squared = sums.shards.weight if sums.shards else weight_norm_squared
        sums.norm[b] += squared(part.h_nD[None, a:z], g_nV[None, a:z])[0]


def _by_chunks(sums: HeadSums, part: TargetGroup, transform: LogitTransform, chunk: int) -> None:
    """One sample (or a rank's part of it) over chunks of the vocabulary, twice: for the normaliser,
    and for the gradients.

    The weight's norm: the Gram matrices of all chunks add up; in the direct form their squares do,
    since their rows of the weight are disjoint.
    """
    wanted, y_n, w_n = sums.wanted, part.y_n, part.w_n
    errors = ErrorNorms(y_n, part.h_nD) if wanted.error_norms else None
    normaliser_n, loss_n = _normaliser(sums, part, transform, chunk, errors)
    sums.add_losses(part, loss_n, errors)
    gradients = wanted.norm or wanted.dh
    if not gradients and wanted.watch is None:
        return
    (sample,) = part.samples
    targets, width = part.h_nD.shape
    # the Gram form's n^2 V against n D V, whose result is written, read and squared: with D =
    # n = 1,024 and V = 32,000 it took 452 ms of processor time against 828 ms, one thread, AVX512
    by_gram = 2 * targets < 3 * width and not sums.shards
    gram_nn = part.h_nD.new_zeros(targets, targets) if by_gram else None
    for first in range(0, sums.weight_VD.shape[0], chunk):
        z_nc = _logits(sums, part, first, chunk, transform)
        if wanted.watch is not None:
            wanted.watch.see(part, z_nc, first, normaliser_n)
        if not gradients:
            continue
        g_nc = (z_nc - normaliser_n[:, None]).exp_().mul_(w_n[:, None])
        column_n1, inside_n1 = chunk_columns(y_n, first, g_nc.shape[1])
        g_nc.scatter_add_(1, column_n1, -w_n[:, None] * inside_n1)
        g_nc = transform.backward(g_nc, z_nc)
        sums.add_gradients(part, g_nc, first)
        if not wanted.norm:
            continue
        if gram_nn is not None:
            gram_nn.addmm_(g_nc, g_nc.T)
        else:
            squared = sums.shards.weight if sums.shards else direct_norm_squared
            sums.norm[sample] += squared(part.h_nD[None], g_nc[None])[0]
    if wanted.norm and gram_nn is not None:
        gram_nn *= part.h_nD @ part.h_nD.T
        sums.norm[sample] = gram_nn.sum(dtype=torch.float64).clamp_min(0)


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
    sums: HeadSums, part: TargetGroup, first: int, chunk: int, transform: LogitTransform
) -> Tensor:
    w_cD = sums.weights(first, min(first + chunk, len(sums.weight_VD)))
    with bfloat16_factors() if sums.short else contextlib.nullcontext():
        logits_nc = part.h_nD @ w_cD.T
    if sums.bias_V is not None:
        logits_nc += sums.bias_V[first : first + len(w_cD)]
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
    sums: HeadSums,
    part: TargetGroup,
    transform: LogitTransform,
    chunk: int,
    errors: ErrorNorms | None,
) -> tuple[Tensor, Tensor]:
    """log-sum-exp of each row and its cross-entropy, over chunks of the vocabulary."""
    h_nD, y_n = part.h_nD, part.y_n
    running_n = h_nD.new_full((len(h_nD),), -math.inf)
    at_target_n = h_nD.new_zeros(len(h_nD))
    for first in range(0, sums.weight_VD.shape[0], chunk):
        z_nc = _logits(sums, part, first, chunk, transform)
        running_n = torch.logaddexp(running_n, z_nc.logsumexp(-1))
        column_n1, inside_n1 = chunk_columns(y_n, first, z_nc.shape[1])
        at_target_n = torch.where(inside_n1, z_nc.gather(1, column_n1), at_target_n[:, None])[:, 0]
        if errors is not None:
            errors.add(z_nc, first)
    return running_n, running_n - at_target_n
