"""The head of a training step: its norms and each sample's weight, off the gradient of the step's
own logits, or, where it makes none, off the gradient of the head's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.linear import accumulate, bias_norm_squared, weight_norm_squared
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.formulas.loss_weights import (
    ExpectedGradients,
    expected_gradients,
    weights_of_hidden,
    weights_of_logits,
)
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.scoring.head_run import HeadRun, head_references


@dataclass
class TrainingHead:
    """One micro-batch's head. matrix: the head is one matrix, measured here; else its sites are.

    Filled as the step goes: losses_S, the sum over each sample's targets, and weights_S, what the
    step's loss weighs each of a sample's targets by.
    """

    measurement: Measurement
    transform: LogitTransform | None
    head: HeadRun
    matrix: bool
    losses_S: Tensor | None = None
    weights_S: Tensor | None = None
    _expected: ExpectedGradients | None = None

    @torch.no_grad()
    def read_logits(self, logits: Tensor) -> None:
        """In the forward: losses, and what the gradients will have to be."""
        layout = self.measurement.layout
        if self.transform is None:
            raise RuntimeError(
                "the model changes its logits behind the head in a way that is not known here, so"
                " the step's loss cannot be checked; use score() instead"
            )
        rows_RV = logits.detach().reshape(-1, logits.shape[-1])
        self._expected = expected_gradients(rows_RV, layout, self.transform)
        zero_S = torch.zeros(layout.num_samples, dtype=torch.float64, device=logits.device)
        losses_N = self._expected.losses_N.double()
        self.losses_S = zero_S.index_add_(0, layout.target_samples, losses_N)

    @property
    def saw_logits(self) -> bool:
        """Whether the step made logits."""
        return self._expected is not None

    def logits_sink(self, hidden: Tensor, grads: Tensor) -> None:
        """In the backward: hidden [B, T, D], the head's input, and the logits' gradient."""
        assert self._expected is not None
        grads_RV = grads.reshape(-1, grads.shape[-1])
        self.weights_S = weights_of_logits(grads_RV, self.measurement.layout, self._expected)
        if self.matrix:
            self._measure(grads_RV, hidden.reshape(-1, hidden.shape[-1]))

    def _measure(self, grads_RV: Tensor, hidden_RD: Tensor) -> None:
        measurement, layout = self.measurement, self.measurement.layout
        names, references = measurement.plan.head_names, head_references(measurement)
        name, bias = names.get("weight"), names.get("bias")
        zero = torch.zeros(layout.num_samples, dtype=torch.float64, device=grads_RV.device)
        weight_S, bias_S, inner_KS = zero.clone(), zero.clone(), zero.repeat(len(references), 1)
        ids_SL = layout.per_sample(layout.input_ids)
        assert ids_SL is not None
        if measurement.tied_name:
            shape = (*ids_SL.shape, hidden_RD.shape[1])
            measurement.head_rows = accumulate(hidden_RD).new_zeros(shape)
        places = layout.target_positions.tolist()  # one read, not one for each sample
        for sample, (start, stop) in enumerate(layout.split_targets()):
            if stop == start:
                continue
            # this sample's targets, without a copy where they are neighbours
            first, last = places[start], places[stop - 1]
            neighbours = last - first + 1 == stop - start
            rows = slice(first, last + 1) if neighbours else layout.target_positions[start:stop]
            g_1tV, h_1tD = grads_RV[rows][None], hidden_RD[rows][None]
            if name:
                weight_S[sample] = weight_norm_squared(h_1tD, g_1tV)[0]
            for inner_S, one in zip(inner_KS, references, strict=True):
                inner_S[sample] = one.products(accumulate(g_1tV[0]), h_1tD[0], 0).sum()
            if name and measurement.head_rows is not None:
                taken_tL = accumulate(g_1tV[0][:, ids_SL[sample]])
                measurement.head_rows[sample] = taken_tL.T @ accumulate(h_1tD[0])
            if bias:
                bias_S[sample] = bias_norm_squared(g_1tV)[0]
        for local, squares_S in ((name, weight_S), (bias, bias_S)):
            if local:
                measurement.add(local, squares_S)
        if references:
            measurement.add_inner(str(name), inner_KS)

    @torch.no_grad()
    def hidden_sink(self, hidden: Tensor, grads: Tensor, mixed: bool) -> None:
        """In the backward of a step without logits: runs the head again, at the targets only.

        The gradient that came back must be each sample's weight times that of its own loss, at its
        targets and nowhere else. mixed: the step computes in half precision.
        """
        measurement, layout = self.measurement, self.measurement.layout
        if self.transform is None:
            raise RuntimeError(
                "the model changes its logits behind the head in a way that is not known here; use"
                " score() instead"
            )
        before = dict(measurement.sums), dict(measurement.inner)
        passed = self.head.unweighted(hidden, measurement, self.transform)
        assert passed.dh is not None
        zero_S = torch.zeros(layout.num_samples, dtype=torch.float64, device=hidden.device)
        self.losses_S = zero_S.index_add_(0, layout.target_samples, passed.losses)
        weights_S = self.weights_S = weights_of_hidden(
            grads.reshape(-1, grads.shape[-1]), layout, passed.dh, mixed
        )
        # the pass was made with weights of 1, and what is measured further down has the step's own
        for sums, own, factor in (
            (measurement.sums, before[0], weights_S.square()),
            (measurement.inner, before[1], weights_S),
        ):
            for name in measurement.plan.head_names.values():
                if name in sums:
                    rest = own.get(name, 0)
                    sums[name] = rest + (sums[name] - rest) * factor
        if measurement.head_rows is not None:
            measurement.head_rows *= weights_S[:, None, None].to(measurement.head_rows.dtype)
