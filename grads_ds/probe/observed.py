"""What a model showed at its head while a recorder scored a batch, and the statistics of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.batch_layout import Layout, read_layout
from grads_ds.gradnorm.formulas.error_norm import error_norms
from grads_ds.gradnorm.formulas.head import LogitTransform
from grads_ds.gradnorm.sharding import gathered
from grads_ds.probe.target_statistics import TargetStatistics, target_statistics


@dataclass
class Observed:
    """`hidden` [B, T, D] entered the head, `logits` left the model (its own only where the recorder
    runs the head plainly).
    """

    recorder: GradNormRecorder
    hidden: Tensor | None = None
    logits: Tensor | None = None

    def pooled(self, layout: Layout) -> Tensor:
        """The mean of the hidden states over each row's tokens, float32 [B, D]."""
        assert self.hidden is not None
        real_BT1 = layout.real[..., None]
        total_BD = (self.hidden.float() * real_BT1).sum(1)
        return total_BD / real_BT1.sum(1).clamp_min(1)

    def statistics(
        self,
        batch: dict[str, Tensor],
        row_weights_V: Tensor | None = None,
        want_row_squares: bool = False,
    ) -> TargetStatistics:
        """The statistics of the batch's target tokens; see `target_statistics`."""
        layout = read_layout(batch)
        rows_ND, weight, bias, transform, whole = self._head_input(layout)
        with whole:
            return target_statistics(
                rows_ND,
                weight,
                bias,
                layout.target_ids,
                layout.split_targets(),
                transform,
                row_weights_V=row_weights_V,
                want_row_squares=want_row_squares,
            )

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        """EL2N of each sample, float64 [B]."""
        layout = read_layout(batch)
        rows_ND, weight, bias, transform, whole = self._head_input(layout)
        with whole:
            lengths_N = error_norms(rows_ND, weight, bias, layout.target_ids, transform)
        total = torch.zeros(layout.num_samples, dtype=torch.float64, device=lengths_N.device)
        total.index_add_(0, layout.target_samples, lengths_N)
        return total / layout.target_counts.clamp_min(1)

    def _head_input(self, layout: Layout) -> tuple[Tensor, Any, Any, LogitTransform, Any]:
        """Rows at the target positions, the head's weight and bias (None: the rows are logits),
        what is done to the logits, and a context in which the weight is whole.
        """
        shown = self.logits if self.recorder.plain_head else self.hidden
        assert shown is not None
        rows_ND = shown.reshape(-1, shown.shape[-1])[layout.target_positions]
        if self.recorder.plain_head:
            return rows_ND, None, None, LogitTransform(), contextlib.nullcontext()
        head: Any = self.recorder.plan.head
        whole = gathered(list(head.parameters(recurse=False)), self.recorder.gather)
        return rows_ND, head.weight, head.bias, self.recorder.head.transform, whole


@contextlib.contextmanager
def observing(recorder: GradNormRecorder) -> Iterator[Observed]:
    """While active, what the model shows in its last forward is kept."""
    observed = Observed(recorder)

    def enters(module: Any, args: tuple[Tensor, ...]) -> None:
        observed.hidden = args[0].detach()

    def leaves(module: Any, args: Any, output: Any) -> None:
        observed.logits = output["logits"].detach()

    handles = [
        recorder.plan.head.register_forward_pre_hook(enters, prepend=True),
        recorder.model.register_forward_hook(leaves),
    ]
    try:
        yield observed
    finally:
        for handle in handles:
            handle.remove()
