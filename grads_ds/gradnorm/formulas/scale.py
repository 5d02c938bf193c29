"""Per-sample gradient of a vector that multiplies what a layer computes. Pure tensor functions.

For y = w * f(inputs) + c, f any function (a norm and its gate: Mamba 2, arXiv 2405.21060, section
7): dLoss/dw = sum_t g_t * f_t, with g_t = dLoss/dy_t.
"""

from __future__ import annotations

from torch import Tensor

from grads_ds.gradnorm.formulas.linear import accumulate


def scale_gradient(factors_SLx: Tensor, grads_SLx: Tensor) -> Tensor:
    """Each sample's dLoss/dw, [S, D], of factors f and gradients g [S, L, ..., D]."""
    products = accumulate(factors_SLx) * accumulate(grads_SLx)
    return products.flatten(1, -2).sum(1)
