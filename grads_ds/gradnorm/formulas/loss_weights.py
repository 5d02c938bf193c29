"""What a training step's loss weighed each sample by, read off the gradients that came back. Pure
tensor functions.

For a cross-entropy in which sample b weighs w_b, the gradient of its logits at a target is w_b
(softmax(z) - onehot(y)) f'(z), with f the model's own transform of its logits; the gradient of the
head's input is the head's weight, transposed, times that. A gradient that is no multiple of it, the
same for all the sample's targets and zero elsewhere, comes of another loss and is refused.

Shapes: R = B * T positions, N targets, P = 2 of each sample with targets, V vocabulary, D width, S
samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.head import LogitTransform
from grads_ds.gradnorm.formulas.linear import accumulate

_CHUNK = 2**24
# of the check that the loss is what it must be; else 0.1
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


class UnsupportedLossError(RuntimeError):
    """The step's loss is not a cross-entropy of the labels with one weight per sample."""

    def __init__(self) -> None:
        super().__init__(
            "the loss of this step is not a cross-entropy of the labels with one weight per sample"
            " (label smoothing, a z-loss, per-token weights, or other labels than the model was"
            " given): per-sample norms of it cannot be told; use score() instead"
        )


def sample_losses(
    logits_RV: Tensor, layout: Layout, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each target, [N], and its sum over each sample's, float64 [S]; a chunk
    of rows at a time.
    """
    step = max(1, _CHUNK // logits_RV.shape[1])
    losses = [accumulate(logits_RV).new_zeros(0)]
    for positions, targets in zip(
        layout.target_positions.split(step), layout.target_ids.split(step), strict=True
    ):
        # a copy: the transform may write into it
        rows = transform.apply(accumulate(logits_RV[positions]))
        losses.append(rows.logsumexp(-1) - rows.gather(1, targets[:, None])[:, 0])
    losses_N = torch.cat(losses)
    zero_S = torch.zeros(layout.num_samples, dtype=torch.float64, device=logits_RV.device)
    return losses_N, zero_S.index_add_(0, layout.target_samples, losses_N.double())


def expected_rows(
    logits_RV: Tensor, layout: Layout, losses_N: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """For each sample with targets the one with the largest loss and its first: which they are
    (index into N, [P]), and their logits' gradient at weight 1, [P, V].
    """
    chosen = []
    for start, stop in layout.split_targets():
        if stop > start:
            chosen += [start + int(losses_N[start:stop].argmax()), start]
    index_P = torch.tensor(chosen, dtype=torch.long, device=logits_RV.device)
    rows = accumulate(logits_RV[layout.target_positions[index_P]]).double()
    transformed = transform.apply(rows)
    expected = transformed.softmax(-1)
    expected[torch.arange(len(index_P), device=expected.device), layout.target_ids[index_P]] -= 1
    return index_P, transform.backward(expected, transformed)


def weights_of_logits(
    grads_RV: Tensor, layout: Layout, index_P: Tensor, expected_PV: Tensor
) -> Tensor:
    """Each sample's weight, float64 [S], by least squares of the logits' gradient on
    `expected_rows`. Raises UnsupportedLossError.
    """
    tolerance = _TOLERANCE.get(grads_RV.dtype, 0.1)
    sizes_R = torch.linalg.vector_norm(grads_RV, dim=-1, dtype=torch.float32).square()
    stray = sizes_R.index_fill(0, layout.target_positions, 0).sum()
    found_PV = grads_RV[layout.target_positions[index_P]].double()
    weight_P = (found_PV * expected_PV).sum(-1) / expected_PV.square().sum(-1).clamp_min(1e-60)
    off_P = (found_PV - weight_P[:, None] * expected_PV).norm(dim=-1)
    wrong = bool((off_P > tolerance * found_PV.norm(dim=-1) + 1e-6 * weight_P.abs()).any())
    first, second = weight_P[0::2], weight_P[1::2]
    clear = expected_PV[1::2].norm(dim=-1) > 1e-3  # a token predicted with certainty tells nothing
    wrong |= bool(((first - second).abs() > tolerance * first.abs())[clear].any())
    if wrong or bool(stray > tolerance**2 * sizes_R.sum()):
        raise UnsupportedLossError
    weights_S = torch.zeros(layout.num_samples, dtype=torch.float64, device=grads_RV.device)
    weights_S[layout.target_samples[index_P]] = weight_P[0::2].repeat_interleave(2)
    return weights_S


def weights_of_hidden(
    grads_RD: Tensor, layout: Layout, own_ND: Tensor, mixed: bool = False
) -> Tensor:
    """Each sample's weight, float64 [S], by least squares of the gradient of the head's input on
    `own_ND`, the same at weight 1.

    mixed: whether the step computed in half precision, whatever the gradient's own is. All targets
    take part, so one among many whose weight differs shows only if it is a good part of the whole.
    Raises UnsupportedLossError.
    """
    tolerance = (0.1 if mixed else _TOLERANCE.get(grads_RD.dtype, 0.1)) ** 2
    found_ND, own_ND = grads_RD[layout.target_positions].double(), own_ND.double()

    def per_sample(products_ND: Tensor) -> Tensor:
        zero_S = products_ND.new_zeros(layout.num_samples)
        return zero_S.index_add_(0, layout.target_samples, products_ND.sum(-1))

    own_S = per_sample(own_ND.square())
    weights_S = per_sample(found_ND * own_ND) / own_S.clamp_min(1e-300)
    off_S = per_sample((found_ND - weights_S[layout.target_samples, None] * own_ND).square())
    total = grads_RD.double().square().sum()
    stray = grads_RD.index_fill(0, layout.target_positions, 0).double().square().sum()
    if bool((off_S > tolerance * per_sample(found_ND.square())).any()) or bool(
        stray > tolerance * total
    ):
        raise UnsupportedLossError
    return weights_S
