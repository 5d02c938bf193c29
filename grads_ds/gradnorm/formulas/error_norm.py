"""EL2N: the length of softmax less one-hot of each target. Pure tensor functions.

With o the logits other than the target's, the square of ||softmax(z) - onehot(y)|| is exp(lse(2 o)
- 2 lse(z)) + exp(lse(o) - lse(z))^2: nothing cancels where the model is all but certain.
Shapes: n target positions, c rows of the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chunk_columns(ids_n: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Where each id stands in a chunk of the vocabulary, [n, 1] (some column of it, where it does
    not), and whether it does; without a read by the host.
    """
    local_n1 = ids_n[:, None] - first
    return local_n1.clamp(0, size - 1), (local_n1 >= 0) & (local_n1 < size)


class ErrorNorms:
    """Error norms of n targets, from their transformed logits z_nc, given in any chunks of the
    vocabulary.
    """

    def __init__(self, target_ids_n: Tensor, like: Tensor) -> None:
        self.ids_n = target_ids_n
        self.others_n = like.new_full((len(target_ids_n),), -math.inf)
        self.doubled_n, self.target_n = self.others_n.clone(), self.others_n.clone()

    def add(self, z_nc: Tensor, first: int) -> None:
        """A chunk of logits whose rows of the vocabulary start at `first`; left unchanged."""
        z_nc = z_nc.clone()
        column_n1, inside_n1 = chunk_columns(self.ids_n, first, z_nc.shape[1])
        own_n1 = z_nc.gather(1, column_n1)
        self.target_n = torch.where(inside_n1[:, 0], own_n1[:, 0], self.target_n)
        z_nc.scatter_(1, column_n1, own_n1.masked_fill(inside_n1, -math.inf))
        self.others_n = torch.logaddexp(self.others_n, z_nc.logsumexp(-1))
        self.doubled_n = torch.logaddexp(self.doubled_n, z_nc.mul_(2).logsumexp(-1))

    def result(self) -> Tensor:
        """||softmax(z) - onehot(y)|| of each target, float64 [n]."""
        whole_n = torch.logaddexp(self.others_n, self.target_n)
        squares_n = (self.doubled_n - 2 * whole_n).double().exp() + (
            self.others_n - whole_n
        ).double().exp().square()
        return squares_n.sqrt()
