"""Per-sample gradient norms of a linear layer's weight and bias. Pure tensor functions.

Shapes: S samples, L tokens of the longest sample, I inputs, O outputs. Rows of padding must carry a
zero gradient. For y_t = W a_t + b with g_t = dLoss/dy_t, the sample's own gradients are dLoss/dW =
sum_t g_t a_t^T and dLoss/db = sum_t g_t. Source of the Gram form: Goodfellow 2015 (arXiv
1510.01799) for one token; Li et al. 2021 (arXiv 2110.05679), eq. 4, for sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Gram sums cancel where the gradient is much smaller than the sum of its tokens' gradients. Beyond
# this ratio (of squares) an fp32 sum may lose more than 1e-5, and the sample is computed again,
# directly and in float64.
_CANCELLATION = 3e3
_DIRECT_BYTES = 2**28
HALVES = (torch.float16, torch.bfloat16)


def accumulate(tensor: Tensor) -> Tensor:
    """The tensor in the precision formulas are computed in: fp32 for half precisions, unchanged
    otherwise.
    """
    return tensor.float() if tensor.dtype in HALVES else tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """[M, K] @ [K, N], or a batch of them, accumulated and given in the precision of `accumulate`.

    A GPU's matrix units multiply half precisions without loss and add in fp32: there they are given
    as they are, ten times as fast as the same numbers in fp32.
    """
    left, right = factor(left), factor(right)
    if left.dtype == right.dtype and left.dtype in HALVES:
        multiply = torch.bmm if left.dim() == 3 else torch.mm
        return multiply(left, right, out_dtype=torch.float32)
    return torch.matmul(accumulate(left), accumulate(right))


@contextlib.contextmanager
def bfloat16_factors() -> Iterator[None]:
    """While active a processor with bfloat16 matrix units multiplies fp32 tensors by them and adds
    in fp32: exact where the factors are bfloat16 numbers, and twice as fast.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def factor(tensor: Tensor) -> Tensor:
    """The tensor as `product` multiplies it, made once where it is cut into many products."""
    return tensor if tensor.is_cuda and tensor.dtype in HALVES else accumulate(tensor)


def squares(tensor: Tensor) -> Tensor:
    """Sum of squares over all but the first dimension, accumulated in float64.

    [S, ...] -> float64 [S].
    """
    flat = tensor.reshape(tensor.shape[0], -1)
    blocks = [(block * block).sum(-1, dtype=torch.float64) for block in flat.split(2**22, dim=-1)]
    return (
        torch.stack(blocks).sum(0) if blocks else flat.new_zeros(flat.shape[0], dtype=torch.float64)
    )


class ActsGram:
    """The Gram matrices of the last activations seen, in strips: layers with the same input (q, k
    and v; gate and up) share them.
    """

    def __init__(self) -> None:
        self._acts: Tensor | None = None  # kept, so that its address is not given to another tensor
        self._seen: tuple[object, ...] = ()
        self._strips: list[Tensor] = []

    def strips(self, acts_SLI: Tensor) -> list[Tensor]:
        """Row strips a_t .

        a_s of the lower triangle, by blocks: strip i is [S, strip, end of strip i].
        """
        if self._seen != _identity(acts_SLI):
            self._acts, self._seen = acts_SLI, _identity(acts_SLI)
            ready = factor(acts_SLI)
            self._strips = [
                product(ready[:, start:stop], ready[:, :stop].mT)
                for start, stop in _bounds(acts_SLI.shape[1])
            ]
        return self._strips


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype


def _bounds(length: int) -> list[tuple[int, int]]:
    """A symmetric matrix is built in up to four strips, 5/8 of the full cost; strips under 64 rows
    only lose speed.
    """
    strip = -(-length // max(1, min(4, length // 64)))
    return [(start, min(start + strip, length)) for start in range(0, length, strip)]


def weight_norm_squared(
    acts_SLI: Tensor, grads_SLO: Tensor, shared: ActsGram | None = None
) -> Tensor:
    """||sum_t g_t a_t^T||_F^2 per sample, by whichever of the two forms is cheaper for this layer
    and this batch.

    The Gram form costs L^2 (I + O), less its symmetric part, the direct form L I O. Returns float64
    [S].
    """
    length, inputs, outputs = acts_SLI.shape[1], acts_SLI.shape[2], grads_SLO.shape[2]
    entries = sum((stop - start) * stop for start, stop in _bounds(length))
    if entries * (inputs + outputs) < length * inputs * outputs:
        return gram_norm_squared(acts_SLI, grads_SLO, shared)
    return direct_norm_squared(acts_SLI, grads_SLO)


def gram_norm_squared(
    acts_SLI: Tensor, grads_SLO: Tensor, shared: ActsGram | None = None
) -> Tensor:
    """sum_{t,s} (a_t . a_s)(g_t .

    g_s) per sample; `shared` spares the first factor where it is known. Returns float64 [S].
    """
    acts_strips = (shared or ActsGram()).strips(acts_SLI)
    grads_SLO = factor(grads_SLO)
    total_S = grads_SLO.new_zeros(grads_SLO.shape[0], dtype=torch.float64)
    sizes_S = torch.zeros_like(total_S)
    for (start, stop), acts in zip(_bounds(grads_SLO.shape[1]), acts_strips, strict=True):
        pairs = product(grads_SLO[:, start:stop], grads_SLO[:, :stop].mT).mul_(acts)
        if start:
            total_S += 2 * pairs[:, :, :start].sum((1, 2), dtype=torch.float64)
        total_S += pairs[:, :, start:].sum((1, 2), dtype=torch.float64)
        diagonal_St = pairs[:, :, start:].diagonal(dim1=1, dim2=2)  # |a_t|^2 |g_t|^2
        sizes_S += diagonal_St.clamp_min(0).sqrt().sum(1, dtype=torch.float64)
    if grads_SLO.dtype == torch.float64:
        return total_S.clamp_min(0)
    cancelled_S = (sizes_S.square() > _CANCELLATION * total_S) & (sizes_S > 0)
    for sample, cancelled in enumerate(cancelled_S.tolist()):  # read from the device once
        if cancelled:
            total_S[sample] = direct_norm_squared(
                acts_SLI[sample : sample + 1].double(), grads_SLO[sample : sample + 1].double()
            )[0]
    return total_S.clamp_min(0)


def direct_norm_squared(acts_SLI: Tensor, grads_SLO: Tensor) -> Tensor:
    """||G^T A||_F^2 per sample. Returns float64 [S]."""
    total_S = acts_SLI.new_zeros(acts_SLI.shape[0], dtype=torch.float64)
    for samples, _, block_srI in _gradient_blocks(acts_SLI, grads_SLO):
        total_S[samples] += squares(block_srI)
    return total_S


def _gradient_blocks(acts_SLI: Tensor, grads_SLO: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """The samples' gradients G^T A, a few samples or output rows at a time so that memory stays
    bounded: which samples, which rows, and [samples, rows, I].
    """
    samples, _, inputs = acts_SLI.shape
    outputs = grads_SLO.shape[2]
    budget = _DIRECT_BYTES // max(4, acts_SLI.element_size())
    rows = max(1, min(outputs, budget // max(1, inputs)))
    group = max(1, budget // max(1, inputs * rows))
    acts_SLI, grads_SLO = factor(acts_SLI), factor(grads_SLO)
    for first in range(0, samples, group):
        some = slice(first, first + group)
        for row in range(0, outputs, rows):
            these = slice(row, row + rows)
            yield some, these, product(grads_SLO[some, :, these].mT, acts_SLI[some])


def bias_norm_squared(grads_SLO: Tensor) -> Tensor:
    """||sum_t g_t||^2 per sample. Returns float64 [S]."""
    return squares(accumulate(grads_SLO).sum(1, dtype=torch.float64))


def weight_inner(acts_SLI: Tensor, grads_SLO: Tensor, reference_OI: Tensor) -> Tensor:
    """<sum_t g_t a_t^T, R> = sum_t g_t . (R a_t) per sample, for a reference gradient R.

    Returns float64 [S].
    """
    if acts_SLI.is_cuda and acts_SLI.dtype == grads_SLO.dtype in HALVES:
        # the reference is fp32: R a_t would be a product of fp32, <G^T A, R> is a sum
        total_S = acts_SLI.new_zeros(acts_SLI.shape[0], dtype=torch.float64)
        for samples, rows, block_srI in _gradient_blocks(acts_SLI, grads_SLO):
            total_S[samples] += (block_srI * reference_OI[rows]).sum((1, 2), dtype=torch.float64)
        return total_S
    grads_SLO = accumulate(grads_SLO)
    projected_SLO = accumulate(acts_SLI) @ reference_OI.T.to(grads_SLO.dtype)
    return (projected_SLO * grads_SLO).sum((1, 2), dtype=torch.float64)


def add_weight_gradient(gradient_OI: Tensor, acts_SLI: Tensor, grads_SLO: Tensor) -> None:
    """Adds the sum over samples of sum_t g_t a_t^T to `gradient_OI`, in its precision."""
    acts_RI, grads_RO = acts_SLI.flatten(0, 1), grads_SLO.flatten(0, 1)
    if gradient_OI.dtype != accumulate(grads_RO).dtype:
        acts_RI, grads_RO = acts_RI.to(gradient_OI.dtype), grads_RO.to(gradient_OI.dtype)
    gradient_OI += product(grads_RO.T, acts_RI)
