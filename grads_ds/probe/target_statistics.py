"""What a model's distribution at the target tokens says of each sample: pure tensor functions.

Shapes: S samples, N target positions (sorted by sample), T of one sample, V vocabulary, D width.
With p_t = softmax(z_t), z_t = f(W h_t + bias), y_t the target and
g_t = f'(.) (p_t - onehot(y_t)) / T the gradient of the sample's mean loss at the head's output:
    loss       mean_t -log p_t[y_t]                   entropy  mean_t H_t = -sum_v p_tv log p_tv
    conflict   mean_t max(0, loss_t - H_t) (1 - H_t / log V): confident, and contradicted
    error      mean_t ||p_t - onehot(y_t)||           (EL2N)
    norm       ||G||, G = sum_t g_t h_t^T             (the head weight's own gradient)
    row_norm   sum_v f_v ||G[v]||^2                   (row Fisher, f given per row)
    ||G[v]||^2 = sum_{t,s} g_tv g_sv (h_t . h_s)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.error_norm import chunk_columns
from grads_ds.gradnorm.formulas.head_sums import TargetGroup
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform

BLOCK = 2**21  # logits looked at together: 8 MiB in float32


@dataclass(frozen=True)
class Asked:
    """Which statistics are wanted beside those of the distribution: norm; row_norm, with f of each
    row of the head; row_squares.
    """

    norm: bool = False
    row_weights_V: Tensor | None = None
    row_squares: bool = False


@dataclass(frozen=True)
class TargetStatistics:
    """Float64 [S] each, 0 for a sample without targets; `norm` and `row_norm` are NaN where they
    were not asked for, or the head is no matrix. `row_squares` [V]: the sum over samples of
    ||G[v]||^2, when asked for.
    """

    loss: Tensor
    entropy: Tensor
    conflict: Tensor
    error: Tensor
    norm: Tensor
    row_norm: Tensor
    row_squares: Tensor | None


class TargetSums:
    """Adds up the statistics while the head's pass shows it the logits (`head_sums.Watch`).

    Args:
        slices: each sample's [start, stop) of the target positions N.
        vocabulary: size of the logits' last dimension.
        transform: what the model does to its logits.
        asked: what is wanted.
        device: of the logits.
    """

    def __init__(
        self,
        slices: list[tuple[int, int]],
        vocabulary: int,
        transform: LogitTransform,
        asked: Asked,
        device: torch.device,
    ) -> None:
        self.slices, self.vocabulary, self.transform = slices, vocabulary, transform
        self.asked = asked
        targets = slices[-1][1] if slices else 0

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        self.loss, self.entropy, self.error = (zeros(targets) for _ in range(3))
        self.norm, self.row_norm = zeros(len(slices)), zeros(len(slices))
        self.squares_V = zeros(vocabulary) if asked.row_squares else None
        # of the sample at hand, over the chunks of its vocabulary
        self._gram_TT: Tensor | None = None
        self._weighted_TT: Tensor | None = None

    def see(self, part: TargetGroup, z_nc: Tensor, first: int, normaliser_n: Tensor | None) -> None:
        """See `head_sums.Watch`."""
        for sample in part.samples:
            start, stop = self.slices[sample]
            rows = slice(start - part.place.start, stop - part.place.start)
            g_Tc = self._distribution(
                start,
                part.y_n[rows],
                z_nc[rows],
                first,
                None if normaliser_n is None else normaliser_n[rows],
            )
            if g_Tc is not None:
                self._gradients(sample, part.h_nD[rows], g_Tc, first)

    def _distribution(
        self, start: int, y_T: Tensor, z_Tc: Tensor, first: int, normaliser_T: Tensor | None
    ) -> Tensor | None:
        """Add a chunk of one sample's logits, in blocks of rows; T g where that is asked for."""
        asked = self.asked
        wanted = asked.norm or asked.row_squares or asked.row_weights_V is not None
        g_Tc = torch.empty_like(z_Tc) if wanted else None
        step = max(1, BLOCK // z_Tc.shape[1])
        for at in range(0, len(y_T), step):
            block, place = slice(at, at + step), slice(start + at, start + min(at + step, len(y_T)))
            z_bc = z_Tc[block]
            column_b1, inside_b1 = chunk_columns(y_T[block], first, z_bc.shape[1])
            inside_b1 = inside_b1.to(z_bc.dtype)
            normaliser_b = z_bc.logsumexp(-1) if normaliser_T is None else normaliser_T[block]
            own_b = ((normaliser_b[:, None] - z_bc.gather(1, column_b1)) * inside_b1)[:, 0]
            self.loss[place] += own_b.double()
            logp_bc = (z_bc - normaliser_b[:, None]).clamp_min_(torch.finfo(z_bc.dtype).min)
            p_bc = logp_bc.exp()
            self.entropy[place] -= logp_bc.mul_(p_bc).sum(-1).double()
            p_bc.scatter_add_(1, column_b1, -inside_b1)
            self.error[place] += p_bc.square().sum(-1).double()
            if g_Tc is not None:
                g_Tc[block] = self.transform.backward(p_bc, z_bc)
        return g_Tc

    def _gradients(self, sample: int, h_TD: Tensor, g_Tc: Tensor, first: int) -> None:
        """Add a chunk of one sample's gradients at the logits, T times what they are."""
        asked, count, chunk = self.asked, len(h_TD), slice(first, first + g_Tc.shape[1])
        inputs_TT = h_TD @ h_TD.T
        if first == 0:
            self._gram_TT, self._weighted_TT = (h_TD.new_zeros(count, count) for _ in range(2))
        assert self._gram_TT is not None and self._weighted_TT is not None
        if asked.norm:
            self._gram_TT.addmm_(g_Tc, g_Tc.T)
        if asked.row_weights_V is not None:
            weights_c = asked.row_weights_V[chunk].to(g_Tc.dtype)
            self._weighted_TT.addmm_(g_Tc * weights_c, g_Tc.T)
        if self.squares_V is not None:
            squares_c = ((inputs_TT @ g_Tc) * g_Tc).sum(0).clamp_min(0).double()
            self.squares_V[chunk] += squares_c / count**2
        if chunk.stop == self.vocabulary:  # the last chunk of this sample
            for total_S, gram_TT in (
                (self.norm, self._gram_TT),
                (self.row_norm, self._weighted_TT),
            ):
                found = (gram_TT * inputs_TT).sum(dtype=torch.float64).clamp_min(0)
                total_S[sample] = found / count**2

    def result(self) -> TargetStatistics:
        """What was added up."""
        samples = len(self.slices)
        counts = torch.tensor(
            [stop - start for start, stop in self.slices], device=self.loss.device
        )
        of_N = torch.repeat_interleave(torch.arange(samples, device=counts.device), counts)

        def mean(values_N: Tensor) -> Tensor:
            sums_S = torch.zeros_like(self.norm).index_add_(0, of_N, values_N)
            return sums_S / counts.clamp_min(1)

        confidence_N = 1 - self.entropy / math.log(self.vocabulary)
        asked = self.asked
        return TargetStatistics(
            loss=mean(self.loss),
            entropy=mean(self.entropy),
            conflict=mean((self.loss - self.entropy).clamp_min(0) * confidence_N),
            error=mean(self.error.sqrt()),
            norm=self.norm.sqrt() if asked.norm else torch.full_like(self.norm, math.nan),
            row_norm=(
                torch.full_like(self.norm, math.nan)
                if asked.row_weights_V is None
                else self.row_norm
            ),
            row_squares=self.squares_V,
        )


def statistics_of_logits(
    logits_NV: Tensor, target_ids_N: Tensor, slices: list[tuple[int, int]]
) -> TargetStatistics:
    """The statistics of a distribution alone, where the model's own head gave the logits [N, V] at
    the target positions.
    """
    sums = TargetSums(slices, logits_NV.shape[1], LogitTransform(), Asked(), logits_NV.device)
    for sample, (start, stop) in enumerate(slices):
        place = slice(start, stop)
        z_TV = accumulate(logits_NV[place])
        if stop > start:
            part = TargetGroup([sample], place, z_TV, target_ids_N[place], z_TV[:, 0])
            sums.see(part, z_TV, 0, None)
    return sums.result()
