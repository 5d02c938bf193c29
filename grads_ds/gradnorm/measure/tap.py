"""Reads what a module computed from and the gradient that comes back to it, without holding any
tensor itself.

A tap is an identity in the autograd graph behind a module's output. The tensors a formula needs
later go through autograd's own saved-tensor mechanism, so that
  - non-reentrant activation checkpointing drops them after the first forward and gives back the
  recomputed ones (a hook that
    keeps a reference defeats it in silence);
  - reentrant checkpointing builds the tap in the recomputation only (its first forward runs without
  gradients);
  - an input changed in place before the backward raises instead of giving a wrong norm;
  - everything is freed when the graph is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        sink: Callable[..., None],
        num_outputs: int,
        anchor: Tensor | None,
        *tensors: Tensor,
    ) -> Any:
        ctx.sink, ctx.num_outputs = sink, num_outputs
        ctx.num_tensors = len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[num_outputs:])
        # detach() and not the tensor itself: autograd would hand that out as a view that must not
        # be changed in place. The version counter stays shared, so an in-place change is still
        # noticed where it matters.
        return tuple(output.detach() for output in tensors[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # may be unpacked only once under checkpointing
        device = next((grad.device.type for grad in grads if grad is not None), "cpu")
        # formulas keep fp32 also where the backward is run inside an autocast
        with torch.autocast(device, enabled=False):
            ctx.sink(grads, saved)
        return (None, None, None, *grads) + (None,) * (ctx.num_tensors - ctx.num_outputs)


def tap(
    outputs: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
    sink: Callable[..., None],
    anchor: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Returns `outputs`, unchanged in value, such that the backward calls `sink(grads, saved)`.

    grads are the gradients of `outputs` (None where none came), saved the tensors given here, or
    the ones recomputed in their place under activation checkpointing. With an `anchor` (any tensor
    that requires grad) the outputs require grad even where nothing before them does: this is how
    frozen models are differentiated. Without one, outputs that need no gradient are returned as
    they are and the sink is never called.
    """
    if not torch.is_grad_enabled() or (
        anchor is None and not any(output.requires_grad for output in outputs)
    ):
        return outputs
    return _Tap.apply(sink, len(outputs), anchor, *outputs, *(tensor.detach() for tensor in saved))
