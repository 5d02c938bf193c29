"""Runs a model's own head over its input at the target positions: the head's parameters made whole,
the formulas of `formulas/head.py` on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas import sequence_shards
from grads_ds.gradnorm.formulas.head import head_pass
from grads_ds.gradnorm.formulas.head_sums import (
    HeadPass,
    HeadReference,
    SequenceShards,
    Wanted,
    Watch,
)
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.measure.frozen import is_plain_linear
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.sharding import Gather, gathered


@dataclass(frozen=True)
class HeadRun:
    """How heads are run. budget: largest number of logits held at a time. group: ranks that share
    each sequence, if any. error_norms: EL2N of each target too. watch: makes what is shown a
    pass's logits, of the batch's layout, the size of the vocabulary and the transform.
    """

    gather: Gather | None
    budget: int
    group: Any = None
    error_norms: bool = False
    watch: Callable[[Layout, int, LogitTransform], Watch] | None = None

    def run(
        self,
        hidden: Tensor,
        measurement: Measurement,
        weights_S: Tensor,
        transform: LogitTransform,
        want_dh: bool = True,
    ) -> HeadPass:
        """One pass over `hidden` [B, T, D]; the head's norms go into the measurement, and what tied
        tables need later.

        Args:
            hidden: the head's input.
            measurement: of this micro-batch.
            weights_S: what each target of a sample weighs.
            transform: what the model does to the logits.
            want_dh: whether the gradient of `hidden` is needed.
        """
        head: Any = measurement.plan.head
        layout, names = measurement.layout, measurement.plan.head_names
        flat_ND = hidden.reshape(-1, hidden.shape[-1])[layout.target_positions]
        name, bias = names.get("weight", ""), names.get("bias", "")
        row_ids_SL = layout.per_sample(layout.input_ids) if measurement.tied_name else None
        shards = None
        if self.group is not None:
            row_ids_SL = (
                None if row_ids_SL is None else sequence_shards.all_tokens(row_ids_SL, self.group)
            )
            shards = SequenceShards(
                partial(sequence_shards.weight_norm_squared, group=self.group),
                partial(sequence_shards.bias_norm_squared, group=self.group),
                sequence_shards.all_reduce_max(
                    int(layout.target_counts.max()), hidden.device, self.group
                ),
            )
        wanted = Wanted(
            norm=bool(names),
            dh=want_dh,
            row_ids_SL=row_ids_SL,
            references=head_references(measurement),
            gradient_VD=measurement.gradients.get(name),
            bias_gradient_V=measurement.gradients.get(bias),
            error_norms=self.error_norms,
            sizes=measurement.want_tokens and bool(names),
        )
        with (
            gathered(list(head.parameters(recurse=False)), self.gather),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            if self.watch is not None:
                wanted = replace(wanted, watch=self.watch(layout, len(head.weight), transform))
            passed = head_pass(
                flat_ND,
                head.weight,
                head.bias,
                layout.target_ids,
                layout.split_targets(),
                weights_S,
                transform=transform,
                wanted=wanted,
                budget=self.budget,
                shards=shards,
            )
        self._keep(measurement, passed, flat_ND)
        return passed

    def _keep(self, measurement: Measurement, passed: HeadPass, hidden_ND: Tensor) -> None:
        names, rows = measurement.plan.head_names, passed.rows
        measurement.head_rows = (
            sequence_shards.reduce_scatter(rows, self.group)
            if self.group and rows is not None
            else rows
        )
        for local, squares_S in (
            ("weight", passed.weight_norm_squared),
            ("bias", passed.bias_norm_squared),
        ):
            if local in names:
                measurement.add(names[local], squares_S)
        if passed.inner is not None:  # weight and bias together: they are one group
            measurement.add_inner(names.get("weight", ""), passed.inner)
        if passed.sizes is not None:  # |g| |h| of the weight, |g| of the bias
            squares_N = hidden_ND.double().square().sum(-1) * ("weight" in names)
            measurement.head_sizes = passed.sizes * (squares_N + ("bias" in names)).sqrt()

    def unweighted(
        self, hidden: Tensor, measurement: Measurement, transform: LogitTransform
    ) -> HeadPass:
        """The pass with every target weighing 1.

        Raises RuntimeError where the head is more than a matrix.
        """
        if not is_plain_linear(measurement.plan.head):
            raise RuntimeError(
                "a step that makes no logits can be recorded only where the head is a linear"
                f" layer, found {type(measurement.plan.head).__name__}"
            )
        ones_S = torch.ones(
            measurement.layout.num_samples, dtype=torch.float64, device=hidden.device
        )
        return self.run(hidden, measurement, ones_S, transform)


def head_references(measurement: Measurement) -> tuple[HeadReference, ...]:
    """The references of the head's parameters, those of one reference together."""
    names = measurement.plan.head_names
    weights = measurement.references.get(names.get("weight", ""), ())
    biases = measurement.references.get(names.get("bias", ""), ())
    pairs = zip_longest(weights, biases[: len(weights)])
    return tuple(HeadReference(weight, bias) for weight, bias in pairs)
