"""Runs a model's own head over its input at the target positions: the head's parameters made whole,
the formulas of `head.py` on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas import sequence_shards
from grads_ds.gradnorm.formulas.head import HeadPass, LogitTransform, SequenceShards, head_pass
from grads_ds.gradnorm.rules import SitePlan, head_name
from grads_ds.gradnorm.sharding import Gather, gathered
from grads_ds.gradnorm.sites import Measurement


@dataclass
class HeadRun:
    """The head of one model. budget: largest number of logits held at a time.

    group: ranks that share each sequence, if any.
    """

    model: nn.Module
    plan: SitePlan
    transform: LogitTransform
    gather: Gather | None
    budget: int
    group: Any = None

    def name(self, local: str) -> str | None:
        """The full name of the head's "weight" or "bias", if it is to be measured."""
        return head_name(self.model, self.plan, local)

    def run(
        self, hidden: Tensor, measurement: Measurement, weights_S: Tensor, want_dh: bool = True
    ) -> HeadPass:
        """One pass over `hidden` [B, T, D]; weights_S is what each target of a sample weighs.

        Sets what tied tables need later.
        """
        head: Any = self.plan.head
        layout = measurement.layout
        flat = hidden.reshape(-1, hidden.shape[-1])[layout.target_positions]
        name, bias = self.name("weight"), self.name("bias")
        row_ids_SL = (
            layout.per_sample(layout.input_ids) if self.plan.tied and name is not None else None
        )
        spread = None
        if self.group is not None:
            row_ids_SL = (
                None if row_ids_SL is None else sequence_shards.all_tokens(row_ids_SL, self.group)
            )
            spread = SequenceShards(
                partial(sequence_shards.weight_norm_squared, group=self.group),
                partial(sequence_shards.bias_norm_squared, group=self.group),
                sequence_shards.all_reduce_max(
                    int(layout.target_counts.max()), hidden.device, self.group
                ),
            )
        with (
            gathered(list(head.parameters(recurse=False)), self.gather),
            torch.autocast(hidden.device.type, enabled=False),
        ):
            passed = head_pass(
                flat,
                head.weight,
                head.bias,
                layout.target_ids,
                layout.split_targets(),
                weights_S,
                transform=self.transform,
                want_norm=name is not None,
                want_dh=want_dh,
                row_ids_SL=row_ids_SL,
                reference_VD=measurement.references.get(name or ""),
                gradient_VD=measurement.gradients.get(name or ""),
                bias_reference_V=measurement.references.get(bias or ""),
                bias_gradient_V=measurement.gradients.get(bias or ""),
                budget=self.budget,
                spread=spread,
            )
        rows = passed.rows
        measurement.head_rows = (
            sequence_shards.reduce_scatter(rows, self.group)
            if self.group and rows is not None
            else rows
        )
        return passed

    def unweighted(self, hidden: Tensor, measurement: Measurement) -> HeadPass:
        """The pass with every target weighing 1.

        Raises RuntimeError where the head is more than a matrix.
        """
        if type(self.plan.head).forward is not nn.Linear.forward:
            raise RuntimeError(
                "a step that makes no logits can be recorded only where the head is a linear"
                f" layer, found {type(self.plan.head).__name__}"
            )
        ones_S = torch.ones(
            measurement.layout.num_samples, dtype=torch.float64, device=hidden.device
        )
        return self.run(hidden, measurement, ones_S)
