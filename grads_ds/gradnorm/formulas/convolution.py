"""Per-sample gradients of a depthwise convolution over tokens. Pure tensor functions.

For y[c, t] = b[c] + sum_k w[c, k] x[c, t + k], x padded (causal: K - 1 zeros in front) and C
channels each with K taps of its own: dLoss/dw[c, k] = sum_t g[c, t] x[c, t + k], dLoss/db[c] =
sum_t g[c, t]. Mamba: arXiv 2312.00752, section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.linear import accumulate


def tap_gradient(acts_SCT: Tensor, grads_SCU: Tensor, taps: int, padding: int) -> Tensor:
    """Each sample's dLoss/dw, [S, C, 1, K]. padding: zeros on either side of the T inputs, so that
    there are U = T + 2 padding - K + 1 outputs.
    """
    acts = torch.nn.functional.pad(accumulate(acts_SCT), (padding, padding))
    grads, length = accumulate(grads_SCU), grads_SCU.shape[2]
    return torch.stack(
        [(acts[:, :, k : k + length] * grads).sum(-1) for k in range(taps)], -1
    ).unsqueeze(2)


def shift_gradient(grads_SCU: Tensor) -> Tensor:
    """Each sample's dLoss/db, [S, C]."""
    return accumulate(grads_SCU).sum(-1)
