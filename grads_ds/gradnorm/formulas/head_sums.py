"""What one pass over the LM head gives, and the accumulator that adds it up, whichever way the
vocabulary is walked. Pure tensor functions. Shapes and equations: see head.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.error_norm import ErrorNorms
from grads_ds.gradnorm.formulas.linear import accumulate, bias_norm_squared


@dataclass(frozen=True)
class HeadPass:
    """loss [S] (weighted sum, float64), weight and bias norm squares [S] (float64), dh [N, D], rows
    [S, L, D] for tied tables, inner [K, S]: inner products of the head's gradient with references.

    Of each target, unweighted, float64 [N]: losses; on request error_norms, the length of softmax
    less one-hot, and sizes, the length of dL/dz. watch: what was shown the logits.
    """

    loss: Tensor
    weight_norm_squared: Tensor
    bias_norm_squared: Tensor
    dh: Tensor | None
    rows: Tensor | None
    inner: Tensor | None
    losses: Tensor
    error_norms: Tensor | None
    sizes: Tensor | None
    watch: Watch | None


@dataclass(frozen=True)
class SequenceShards:
    """For samples whose sequences several ranks share: squared norms of gradients summed over those
    ranks, and the largest number of targets that any of them has in one sample.
    """

    weight: Callable[[Tensor, Tensor], Tensor]
    bias: Callable[[Tensor], Tensor]
    longest: int


@dataclass(frozen=True)
class HeadReference:
    """A gradient of the head that those of samples are compared with."""

    weight_VD: Tensor
    bias_V: Tensor | None

    def products(self, g_nc: Tensor, h_nD: Tensor, first: int) -> Tensor:
        """<g_t h_t^T, R> + g_t . r of each target, float64 [n], for the gradients g at the logits
        from row `first` of the vocabulary on.
        """
        rows = slice(first, first + g_nc.shape[1])
        products_nD = g_nc @ self.weight_VD[rows].to(g_nc.dtype) * h_nD
        found_n = products_nD.sum(-1, dtype=torch.float64)
        if self.bias_V is not None:
            found_n += (g_nc @ self.bias_V[rows].to(g_nc.dtype)).double()
        return found_n


@dataclass(frozen=True)
class Wanted:
    """What a pass over the head gives beside the losses.

    row_ids_SL: rows x_t of each sample's head gradient (tied tables). references: the inner product
    with each of them per sample. gradient_VD and bias_gradient_V: the batch's summed gradient is
    added to them. error_norms: EL2N of each target. sizes: the length of
    each target's gradient of its logits. watch: is shown all transformed logits.
    """

    norm: bool = True
    dh: bool = True
    row_ids_SL: Tensor | None = None
    references: tuple[HeadReference, ...] = ()
    gradient_VD: Tensor | None = None
    bias_gradient_V: Tensor | None = None
    error_norms: bool = False
    sizes: bool = False
    watch: Watch | None = None


@dataclass(frozen=True)
class TargetGroup:
    """Neighbouring samples taken together: their numbers, their place in N, hidden, targets and
    weights.
    """

    samples: list[int]
    place: slice
    h_nD: Tensor
    y_n: Tensor
    w_n: Tensor


class Watch(Protocol):
    """Is shown the transformed logits of a pass, for sums of its own."""

    def see(self, part: TargetGroup, z_nc: Tensor, first: int, normaliser_n: Tensor | None) -> None:
        """A chunk z of a part's logits, not to be changed, whose rows of the vocabulary start at
        `first`. normaliser_n: their log-sum-exp over the whole vocabulary; None where z is all of
        it.
        """


class HeadSums:
    """What a pass adds up, whichever way the vocabulary is walked."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        slices: list[tuple[int, int]],
        wanted: Wanted,
        shards: SequenceShards | None,
    ) -> None:
        self.short = hidden_ND.dtype == weight_VD.dtype == torch.bfloat16
        hidden_ND = accumulate(hidden_ND)
        self.hidden_ND, self.weight_VD, self.bias_V = hidden_ND, weight_VD, bias_V
        self.slices, self.wanted, self.shards = slices, wanted, shards
        self._ready: tuple[tuple[int, int], Tensor] | None = None
        targets, samples = len(hidden_ND), len(slices)

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=hidden_ND.device)

        self.loss, self.norm, self.bias_norm = (zeros(samples) for _ in range(3))
        self.inner_KS = self.norm.new_zeros(len(wanted.references), samples)
        self.losses = zeros(targets)
        self.errors = zeros(targets) if wanted.error_norms else None
        self.sizes = zeros(targets) if wanted.sizes else None
        self.dh_ND = torch.zeros_like(hidden_ND) if wanted.dh else None
        ids_SL = wanted.row_ids_SL
        width = hidden_ND.shape[1]
        self.rows_SLD = None if ids_SL is None else hidden_ND.new_zeros(*ids_SL.shape, width)

    def weights(self, first: int, stop: int) -> Tensor:
        """Rows of the weight in the precision of formulas, made once for neighbouring uses."""
        if self._ready is None or self._ready[0] != (first, stop):
            self._ready = (first, stop), accumulate(self.weight_VD[first:stop])
        return self._ready[1]

    def of(self, part: TargetGroup) -> list[tuple[int, int, int]]:
        """Each sample of the part, with its [start, stop) inside the part."""
        first = part.place.start
        return [(b, self.slices[b][0] - first, self.slices[b][1] - first) for b in part.samples]

    def add_losses(self, part: TargetGroup, loss_n: Tensor, errors: ErrorNorms | None) -> None:
        """Cross-entropies of a part's targets."""
        self.losses[part.place] = loss_n.double()
        weighted_n = loss_n.double() * part.w_n.double()
        for b, a, z in self.of(part):
            self.loss[b] = weighted_n[a:z].sum()
        if self.errors is not None and errors is not None:
            self.errors[part.place] = errors.result()

    def add_gradients(self, part: TargetGroup, g_nc: Tensor, first: int) -> None:
        """A chunk of the logits' gradient: all but the weight's norm, which each walk has its own
        way to.
        """
        wanted, w_cD = self.wanted, self.weights(first, first + g_nc.shape[1])
        rows = slice(first, first + len(w_cD))
        if self.dh_ND is not None:
            self.dh_ND[part.place].addmm_(g_nc, w_cD)
        if self.sizes is not None:
            unweighted_nc = g_nc / part.w_n.clamp_min(1e-30)[:, None]
            self.sizes[part.place] += unweighted_nc.square_().sum(-1, dtype=torch.float64)
        # the batch's gradient and the inner products with references
        if wanted.gradient_VD is not None:
            kind = wanted.gradient_VD.dtype
            wanted.gradient_VD[rows].addmm_(g_nc.T.to(kind), part.h_nD.to(kind))
        if wanted.bias_gradient_V is not None:
            wanted.bias_gradient_V[rows] += g_nc.sum(0)
        products_Kn = [one.products(g_nc, part.h_nD, first) for one in wanted.references]
        # each sample's own
        for b, a, z in self.of(part):
            for inner_S, products_n in zip(self.inner_KS, products_Kn, strict=True):
                inner_S[b] += products_n[a:z].sum()
            if wanted.norm and self.bias_V is not None:
                squared = self.shards.bias if self.shards else bias_norm_squared
                self.bias_norm[b] += squared(g_nc[None, a:z])[0]
            if self.rows_SLD is not None and wanted.row_ids_SL is not None:
                ids_L = wanted.row_ids_SL[b]
                if len(w_cD) == len(self.weight_VD):  # the whole vocabulary: no rows to look for
                    self.rows_SLD[b] = g_nc[a:z][:, ids_L].T @ part.h_nD[a:z]
                    continue
                here = ((ids_L >= first) & (ids_L < first + len(w_cD))).nonzero()[:, 0]
                self.rows_SLD[b, here] = g_nc[a:z][:, ids_L[here] - first].T @ part.h_nD[a:z]

    def result(self) -> HeadPass:
        """What was added up."""
        return HeadPass(
            self.loss,
            self.norm,
            self.bias_norm,
            self.dh_ND,
            self.rows_SLD,
            self.inner_KS if self.wanted.references else None,
            self.losses,
            self.errors,
            None if self.sizes is None else self.sizes.sqrt(),
            self.wanted.watch,
        )
