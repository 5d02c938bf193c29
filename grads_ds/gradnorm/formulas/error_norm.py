"""EL2N: the length of softmax less one-hot, averaged over a sample's targets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.head import LogitTransform
from grads_ds.gradnorm.formulas.linear import accumulate

LOGITS = 2**25  # held at a time for el2n


def error_norms(
    hidden_ND: Tensor,
    weight_VD: Tensor | None,
    bias_V: Tensor | None,
    target_ids_N: Tensor,
    transform: LogitTransform,
    budget: int = LOGITS,
) -> Tensor:
    """||softmax(f(W h + bias)) - onehot(y)|| of each row, float64 [N]; without a weight the rows
    are the logits.

    With o the logits other than the target's, its square is exp(lse(2 o) - 2 lse(z)) + exp(lse(o) -
    lse(z))^2: nothing cancels where the model is all but certain. Chunks of the vocabulary: at most
    `budget` logits, and as many rows of the weight, are held at a time.
    """
    rows_ND = accumulate(hidden_ND)
    others_N = rows_ND.new_full((len(target_ids_N),), -math.inf)
    doubled_N, target_N = others_N.clone(), others_N.clone()
    values = rows_ND.shape[1] if weight_VD is None else len(weight_VD)
    chunk = max(1, budget // max(1, len(target_ids_N)))
    for first in range(0, values if len(target_ids_N) else 0, chunk):
        if weight_VD is None:
            z_Nc = rows_ND[:, first : first + chunk].clone()
        else:
            z_Nc = rows_ND @ accumulate(weight_VD[first : first + chunk]).T
        if bias_V is not None:
            z_Nc += bias_V[first : first + chunk]
        z_Nc = transform.apply(z_Nc)
        here = ((target_ids_N >= first) & (target_ids_N < first + z_Nc.shape[1])).nonzero()[:, 0]
        target_N[here] = z_Nc[here, target_ids_N[here] - first]
        z_Nc[here, target_ids_N[here] - first] = -math.inf
        others_N = torch.logaddexp(others_N, z_Nc.logsumexp(-1))
        doubled_N = torch.logaddexp(doubled_N, (2 * z_Nc).logsumexp(-1))
    whole_N = torch.logaddexp(others_N, target_N)
    squares_N = (doubled_N - 2 * whole_N).double().exp() + (
        others_N - whole_N
    ).double().exp().square()
    return squares_N.sqrt()
