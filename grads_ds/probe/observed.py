"""What a model showed at its head while a recorder scored a batch, and the statistics of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.probe.target_statistics import (
    Asked,
    TargetStatistics,
    TargetSums,
    statistics_of_logits,
)


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

    def statistics(self) -> TargetStatistics:
        """The statistics of the batch's target tokens that `observing` was asked for."""
        parts = [_statistics(view) for view in self.views]
        names = [field.name for field in fields(TargetStatistics) if field.name != "row_squares"]
        squares = [part.row_squares for part in parts if part.row_squares is not None]
        return TargetStatistics(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in names},
            row_squares=torch.stack(squares).sum(0) if squares else None,
        )


def _statistics(view: HeadView) -> TargetStatistics:
    if isinstance(view.watch, TargetSums):
        return view.watch.result()
    return statistics_of_logits(
        view.at_targets()[0], view.layout.target_ids, view.layout.split_targets()
    )


@contextlib.contextmanager
def observing(recorder: GradNormRecorder, asked: Asked | None = None) -> Iterator[Observed]:
    """While active, what the model showed for the last scored batch is kept. asked: the statistics
    to be added up from the very logits that the losses are made of.
    """

    def watch(layout: Layout, vocabulary: int, transform: LogitTransform) -> TargetSums:
        assert asked is not None
        slices, device = layout.split_targets(), layout.input_ids.device
        return TargetSums(slices, vocabulary, transform, asked, device)

    with recorder.observing(watch if asked is not None else None) as views:
        yield Observed(views)
