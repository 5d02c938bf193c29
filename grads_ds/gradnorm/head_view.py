"""What a scored micro-batch showed at the model's head, for statistics of one's own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.head_sums import Watch
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.sharding import Gather, gathered


@dataclass(frozen=True)
class HeadView:
    """hidden [B, T, D] entered the head; logits [B, T, V] left the model, where the model's own
    head ran. layout: of the batch as it was measured (padded on the right, perhaps unpacked);
    samples keep their order. watch: was shown the logits, where one was asked for and another head
    than the model's own ran.
    """

    layout: Layout
    head: nn.Module
    hidden: Tensor
    logits: Tensor | None
    transform: LogitTransform
    gather: Gather | None
    watch: Watch | None = None

    def at_targets(self) -> tuple[Tensor, Any, Any, LogitTransform]:
        """Rows at the target positions, the head's weight and bias, and what the model does to the
        logits; where the model's own head ran, rows are logits and weight and bias None.
        """
        places = self.layout.target_positions
        if self.logits is not None:
            rows = self.logits.reshape(-1, self.logits.shape[-1])
            return rows[places], None, None, LogitTransform()
        head: Any = self.head
        rows = self.hidden.reshape(-1, self.hidden.shape[-1])
        return rows[places], head.weight, head.bias, self.transform

    def whole(self) -> AbstractContextManager[None]:
        """The head's parameters whole for a while."""
        return gathered(list(self.head.parameters(recurse=False)), self.gather)
