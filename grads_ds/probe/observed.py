"""What a model showed at its head while a recorder scored a batch, and the statistics of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.probe.target_statistics import TargetStatistics, target_statistics


@dataclass
class Observed:
    """The last scored batch, in the parts it was measured in; samples B keep their order."""

    views: list[HeadView]

    def pooled(self) -> Tensor:
        """The mean of the hidden states over each row's tokens, float32 [B, D]."""
        means = []
        for view in self.views:
            real_BT1 = view.layout.real[..., None]
            total_BD = (view.hidden.float() * real_BT1).sum(1)
            means.append(total_BD / real_BT1.sum(1).clamp_min(1))
        return torch.cat(means)

    def statistics(
        self, row_weights_V: Tensor | None = None, want_row_squares: bool = False
    ) -> TargetStatistics:
        """The statistics of the batch's target tokens; see `target_statistics`."""
        parts = []
        # made whole once for all parts: ranks may have measured their batches in unequal numbers
        with self.views[0].whole():
            for view in self.views:
                rows_ND, weight, bias, transform = view.at_targets()
                found = target_statistics(
                    rows_ND,
                    weight,
                    bias,
                    view.layout.target_ids,
                    view.layout.split_targets(),
                    transform,
                    row_weights_V=row_weights_V,
                    want_row_squares=want_row_squares,
                )
                parts.append(found)
        names = [field.name for field in fields(TargetStatistics) if field.name != "row_squares"]
        squares = [part.row_squares for part in parts if part.row_squares is not None]
        return TargetStatistics(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
            row_squares=torch.stack(squares).sum(0) if squares else None,
        )


@contextlib.contextmanager
def observing(recorder: GradNormRecorder) -> Iterator[Observed]:
    """While active, what the model showed for the last scored batch is kept."""
    with recorder.observing() as views:
        yield Observed(views)
