"""Per-sample gradient norms of a linear layer's weight and bias. Pure tensor functions.

Shapes: S samples, L tokens of the longest sample, I inputs, O outputs. Rows of padding must carry a zero gradient.
For y_t = W a_t + b with g_t = dLoss/dy_t, the sample's own gradients are dLoss/dW = sum_t g_t a_t^T and dLoss/db = sum_t g_t.
Source of the Gram form: Goodfellow 2015 (arXiv 1510.01799) for one token; Li et al. 2021 (arXiv 2110.05679), eq. 4, for sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Gram sums cancel where the gradient is much smaller than the sum of its tokens' gradients. Beyond this ratio (of squares) an
# fp32 sum may lose more than 1e-5, and the sample is computed again, directly and in float64.
_CANCELLATION = 3e3
_STRIPS = 8  # a symmetric Gram matrix is built in this many strips: (1 + 1/8) / 2 of the full cost
_DIRECT_BYTES = 2**28


def accumulate(tensor: Tensor) -> Tensor:
    """The tensor in the precision formulas are computed in: fp32 for half precisions, unchanged otherwise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def squares(tensor: Tensor) -> Tensor:
    """Sum of squares over all but the first dimension, accumulated in float64. [S, ...] -> float64 [S]."""
    flat = tensor.reshape(tensor.shape[0], -1)
    blocks = [(block * block).sum(-1, dtype=torch.float64) for block in flat.split(2**22, dim=-1)]
    return torch.stack(blocks).sum(0) if blocks else flat.new_zeros(flat.shape[0], dtype=torch.float64)


def weight_norm_squared(acts_SLI: Tensor, grads_SLO: Tensor) -> Tensor:
    """||sum_t g_t a_t^T||_F^2 per sample, by whichever of the two forms is cheaper for this layer and this batch.

    The Gram form costs L^2 (I + O) (half of it, for symmetry), the direct form L I O. Returns float64 [S].
    """
    length, inputs, outputs = acts_SLI.shape[1], acts_SLI.shape[2], grads_SLO.shape[2]
    if length * (inputs + outputs) * (1 + 1 / _STRIPS) / 2 < inputs * outputs:
        return gram_norm_squared(acts_SLI, grads_SLO)
    return direct_norm_squared(acts_SLI, grads_SLO)


def gram_norm_squared(acts_SLI: Tensor, grads_SLO: Tensor) -> Tensor:
    """sum_{t,s} (a_t . a_s)(g_t . g_s) per sample. Returns float64 [S]."""
    acts_SLI, grads_SLO = accumulate(acts_SLI), accumulate(grads_SLO)
    length = acts_SLI.shape[1]
    total_S = acts_SLI.new_zeros(acts_SLI.shape[0], dtype=torch.float64)
    strip = max(16, -(-length // _STRIPS))
    for start in range(0, length, strip):
        stop = min(start + strip, length)
        pairs = torch.bmm(acts_SLI[:, start:stop], acts_SLI[:, :stop].mT)
        pairs *= torch.bmm(grads_SLO[:, start:stop], grads_SLO[:, :stop].mT)
        total_S += 2 * pairs[:, :, :start].sum((1, 2), dtype=torch.float64)
        total_S += pairs[:, :, start:].sum((1, 2), dtype=torch.float64)
    if acts_SLI.dtype == torch.float64 or length == 0:
        return total_S.clamp_min(0)
    sizes_SL = torch.linalg.vector_norm(acts_SLI, dim=-1) * torch.linalg.vector_norm(grads_SLO, dim=-1)
    cancelled_S = sizes_SL.sum(-1, dtype=torch.float64).square() > _CANCELLATION * total_S
    cancelled_S &= sizes_SL.sum(-1) > 0
    for sample in cancelled_S.nonzero()[:, 0].tolist():
        total_S[sample] = direct_norm_squared(acts_SLI[sample:sample + 1].double(), grads_SLO[sample:sample + 1].double())[0]
    return total_S.clamp_min(0)


def direct_norm_squared(acts_SLI: Tensor, grads_SLO: Tensor) -> Tensor:
    """||G^T A||_F^2 per sample, a few samples or output rows at a time so that memory stays bounded. Returns float64 [S]."""
    acts_SLI, grads_SLO = accumulate(acts_SLI), accumulate(grads_SLO)
    samples, _, inputs = acts_SLI.shape
    outputs = grads_SLO.shape[2]
    total_S = acts_SLI.new_zeros(samples, dtype=torch.float64)
    budget = _DIRECT_BYTES // acts_SLI.element_size()
    rows = max(1, min(outputs, budget // max(1, inputs)))
    group = max(1, budget // max(1, inputs * rows))
    for first in range(0, samples, group):
        acts, grads = acts_SLI[first:first + group], grads_SLO[first:first + group]
        for row in range(0, outputs, rows):
            total_S[first:first + group] += squares(torch.bmm(grads[:, :, row:row + rows].mT, acts))
    return total_S


def bias_norm_squared(grads_SLO: Tensor) -> Tensor:
    """||sum_t g_t||^2 per sample. Returns float64 [S]."""
    return squares(accumulate(grads_SLO).sum(1, dtype=torch.float64))


def weight_inner(acts_SLI: Tensor, grads_SLO: Tensor, reference_OI: Tensor) -> Tensor:
    """<sum_t g_t a_t^T, R> = sum_t g_t . (R a_t) per sample, for a reference gradient R. Returns float64 [S]."""
    grads_SLO = accumulate(grads_SLO)
    projected_SLO = accumulate(acts_SLI) @ reference_OI.T.to(grads_SLO.dtype)
    return (projected_SLO * grads_SLO).sum((1, 2), dtype=torch.float64)


def add_weight_gradient(gradient_OI: Tensor, acts_SLI: Tensor, grads_SLO: Tensor) -> None:
    """Adds the sum over samples of sum_t g_t a_t^T to `gradient_OI`, in its precision."""
    acts_RI, grads_RO = acts_SLI.flatten(0, 1).to(gradient_OI.dtype), grads_SLO.flatten(0, 1).to(gradient_OI.dtype)
    gradient_OI += grads_RO.T @ acts_RI
