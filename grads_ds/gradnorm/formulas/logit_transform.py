"""What a model does to its logits behind the head. Pure tensor functions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """f(z) = cap * tanh(scale * z / cap), or scale * z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """f, written into `logits` where that is possible."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.cap is not None:
            logits = logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def backward(self, grads: Tensor, transformed: Tensor) -> Tensor:
        """f'(.) * grads, given f's own output."""
        if self.cap is not None:
            grads = grads * (1 - (transformed / self.cap).square())
        return grads * self.scale if self.scale != 1.0 else grads
