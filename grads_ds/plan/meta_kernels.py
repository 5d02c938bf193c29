"""Attention and linear layers on the meta device that keep for their backward what the real kernels
keep, and compute nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

ATTENTION = "grads_ds_on_meta"


def attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """Attention that computes nothing and keeps for its backward what fused kernels keep."""
    return _Fused.apply(query, key, value), None


class _Fused(torch.autograd.Function):
    """Queries [B, H, T, D], keys, values (not repeated where heads share them), the output and one
    number a row: not the T x T weights.
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        # kernels write [B, T, H, D], so that putting the heads together copies nothing
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[-1])
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(rows, heads, length, dtype=torch.float32)
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Linear(torch.autograd.Function):
    """y = x W^T (+ b) that keeps x, as deepspeed/runtime/zero/linear.py does for every weight
    (0.19.8).
    """

    @staticmethod
    def forward(ctx: Any, value: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(value, weight)
        return value @ weight.T if bias is None else value @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _, weight = ctx.saved_tensors
        return grad @ weight, None, None


@contextlib.contextmanager
def inputs_kept() -> Iterator[None]:
    """Within it, linear layers keep their input though their weight is frozen."""
    original = torch.nn.functional.linear
    torch.nn.functional.linear = lambda value, weight, bias=None: _Linear.apply(value, weight, bias)
    try:
        yield
    finally:
        torch.nn.functional.linear = original
