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

from dataclasses import dataclass

import torch
from torch import Tensor

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform

_CHUNK = 2**24
# of the check that the loss is what it must be: relative, and in parts of softmax less one-hot
_FULL, _HALF = (2e-5, 1e-5), (2e-2, 1e-3)
_MIXED = 0.1  # of the gradient of the head's input, where the step computed in half precision


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    return _FULL if dtype in (torch.float32, torch.float64) else _HALF


class UnsupportedLossError(RuntimeError):
    """The step's loss is not a cross-entropy of the labels with one weight per sample."""

    def __init__(self) -> None:
        super().__init__(
            "the loss of this step is not a cross-entropy of the labels with one weight per sample"
            " (label smoothing, a z-loss, per-token weights, or other labels than the model was"
            " given): per-sample norms of it cannot be told; use score() instead"
        )


@dataclass(frozen=True)
class ExpectedGradients:
    """What the logits' gradients are if every target weighs 1.

    losses_N: cross-entropies. at_target_N: the gradient of the target's own logit, float64. index_P
    and rows_PV: of each sample with targets, the one with the largest loss and the first, in turn:
    which they are, and their whole rows. balanced: rows add up to zero (no soft cap).
    """

    losses_N: Tensor
    at_target_N: Tensor
    index_P: Tensor
    rows_PV: Tensor
    balanced: bool


def expected_gradients(
    logits_RV: Tensor, layout: Layout, transform: LogitTransform
) -> ExpectedGradients:
    """Reads them off the head's own logits, a chunk of rows at a time."""
    step = max(1, _CHUNK // logits_RV.shape[1])
    losses = [accumulate(logits_RV).new_zeros(0)]
    at_target = [losses[0].double()]
    for positions, targets in zip(
        layout.target_positions.split(step), layout.target_ids.split(step), strict=True
    ):
        # a copy: the transform may write into it
        rows = transform.apply(accumulate(logits_RV[positions]))
        own = rows.gather(1, targets[:, None])[:, 0]
        losses.append(rows.logsumexp(-1) - own)
        at_target.append(transform.backward(torch.expm1(-losses[-1].double()), own.double()))
    losses_N = torch.cat(losses)
    chosen = []
    on_host_N = losses_N.cpu()  # one read, not one for each sample
    for start, stop in layout.split_targets():
        if stop > start:
            chosen += [start + int(on_host_N[start:stop].argmax()), start]
    index_P = torch.tensor(chosen, dtype=torch.long, device=logits_RV.device)
    rows = accumulate(logits_RV[layout.target_positions[index_P]]).double()
    transformed = transform.apply(rows)
    expected = transformed.softmax(-1)
    expected[torch.arange(len(index_P), device=expected.device), layout.target_ids[index_P]] -= 1
    rows_PV = transform.backward(expected, transformed)
    return ExpectedGradients(
        losses_N, torch.cat(at_target), index_P, rows_PV, transform.cap is None
    )


def weights_of_logits(grads_RV: Tensor, layout: Layout, expected: ExpectedGradients) -> Tensor:
    """Each sample's weight, float64 [S], by least squares of two rows of the logits' gradient on
    what is expected. Raises UnsupportedLossError unless every target weighs the same, every row
    adds up to what it must, and nothing else has a gradient.
    """
    relative, absolute = _tolerance(grads_RV.dtype)
    index_P, expected_PV = expected.index_P, expected.rows_PV
    wide = torch.float64 if grads_RV.dtype == torch.float64 else torch.float32
    sizes_R = torch.linalg.vector_norm(grads_RV, dim=-1, dtype=wide).square()
    stray = sizes_R.index_fill(0, layout.target_positions, 0).sum()
    # two whole rows of each sample
    found_PV = grads_RV[layout.target_positions[index_P]].double()
    weight_P = (found_PV * expected_PV).sum(-1) / expected_PV.square().sum(-1).clamp_min(1e-60)
    off_P = (found_PV - weight_P[:, None] * expected_PV).norm(dim=-1)
    wrong = bool((off_P > relative * found_PV.norm(dim=-1) + absolute * weight_P.abs()).any())
    weights_S = torch.zeros(layout.num_samples, dtype=torch.float64, device=grads_RV.device)
    weights_S[layout.target_samples[index_P]] = weight_P[0::2].repeat_interleave(2)
    # every target's own logit, and the sum of its row
    weight_N = weights_S[layout.target_samples]
    found_N = grads_RV[layout.target_positions, layout.target_ids].double()
    off_N = (found_N - weight_N * expected.at_target_N).abs()
    smallest = torch.finfo(grads_RV.dtype).smallest_normal
    allowed_N = weight_N.abs() * (relative * expected.at_target_N.abs() + absolute) + smallest
    wrong |= bool((off_N > allowed_N).any())
    if expected.balanced:
        sums_R = grads_RV.sum(-1, dtype=wide)
        wrong |= bool((sums_R[layout.target_positions].abs() > allowed_N).any())
    if wrong or bool(stray > relative**2 * sizes_R.sum()):
        raise UnsupportedLossError
    return weights_S


def weights_of_hidden(
    grads_RD: Tensor, layout: Layout, own_ND: Tensor, mixed: bool = False
) -> Tensor:
    """Each sample's weight, float64 [S], by least squares of the gradient of the head's input on
    `own_ND`, the same at weight 1.

    mixed: whether the step computed in half precision, whatever the gradient's own is. Raises
    UnsupportedLossError unless every target's gradient is that multiple of its own.
    """
    half = mixed or grads_RD.dtype not in (torch.float32, torch.float64)
    tolerance = _MIXED if half else 1e-3
    found_ND, own_ND = grads_RD[layout.target_positions].double(), own_ND.double()

    def per_sample(values_N: Tensor) -> Tensor:
        zero_S = values_N.new_zeros(layout.num_samples)
        return zero_S.index_add_(0, layout.target_samples, values_N)

    squares_N = own_ND.square().sum(-1)
    weights_S = per_sample((found_ND * own_ND).sum(-1)) / per_sample(squares_N).clamp_min(1e-300)
    weight_N = weights_S[layout.target_samples]
    off_N = (found_ND - weight_N[:, None] * own_ND).norm(dim=-1)
    mean_N = (per_sample(squares_N) / layout.target_counts.clamp_min(1))[layout.target_samples]
    # beside a token's own gradient: rounding, in parts of its sample's tokens'
    allowed_N = tolerance * weight_N.abs() * (squares_N.sqrt() + 0.1 * mean_N.sqrt())
    total = grads_RD.double().square().sum()
    stray = grads_RD.index_fill(0, layout.target_positions, 0).double().square().sum()
    if bool((off_N > allowed_N).any()) or bool(stray > tolerance**2 * total):
        raise UnsupportedLossError
    return weights_S
