"""Per-sample gradient norms of normalisation layers' weight and bias. Pure tensor functions.

For y = xhat * w (+ b), or y = xhat * (1 + w): dLoss/dw = sum_t g_t * xhat_t, dLoss/db = sum_t g_t,
with xhat the normalised input. RMSNorm: Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4; LayerNorm:
Ba et al. 2016 (arXiv 1607.06450). The weight may be shared by several heads, [S, L, H, W] against
[W], or not, against [H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.linear import accumulate


def normalise(acts: Tensor, eps: float, centred: bool) -> Tensor:
    """xhat over the last dimension, in fp32 or wider: x / sqrt(mean(x^2) + eps), of x - mean(x) if
    `centred` (LayerNorm).
    """
    acts = accumulate(acts)
    if centred:
        acts = acts - acts.mean(-1, keepdim=True)
    return acts * torch.rsqrt((acts * acts).mean(-1, keepdim=True) + eps)


def scale_gradient(
    acts_SLx: Tensor, grads_SLx: Tensor, weight_dims: int, eps: float, centred: bool
) -> Tensor:
    """Each sample's dLoss/dw, [S, *weight shape]: sum of g * xhat over all but the sample and the
    weight's own dimensions.
    """
    return _sum_to_weight(normalise(acts_SLx, eps, centred) * accumulate(grads_SLx), weight_dims)


def shift_gradient(grads_SLx: Tensor, weight_dims: int) -> Tensor:
    """Each sample's dLoss/db, [S, *bias shape]."""
    return _sum_to_weight(accumulate(grads_SLx), weight_dims)


def _sum_to_weight(products: Tensor, weight_dims: int) -> Tensor:
    summed = tuple(range(1, products.dim() - weight_dims))
    return products.sum(summed) if summed else products
