"""A tensor that all samples share and that becomes each sample's own where it is repeated for them,
or added to what they have: the place where its gradients can still be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SharedTensor(Tensor):
    """A tensor that hands itself to `spread` when it is repeated along its first dimension, or
    added to a tensor of one dimension more, [B, ...]: spread(its copies, [B, ...]).

    Any other use makes it an ordinary tensor again, and spread(None) says so.
    """

    spread: Callable[[Tensor | None], Tensor | None]

    @classmethod
    def of(cls, tensor: Tensor, spread: Callable[[Tensor | None], Tensor | None]) -> SharedTensor:
        shared = tensor.as_subclass(cls)
        shared.spread = spread
        return shared

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ADDS and (spread := cls._added(args[:2])) is not None:
                return func(*spread, *args[2:], **(kwargs or {}))
            own = args[0] if args and isinstance(args[0], cls) else None
            output = func(*args, **(kwargs or {}))
            if func in _LOOKS or (own is None and not isinstance(output, Tensor)):
                return output
            plain = output.as_subclass(Tensor) if isinstance(output, Tensor) else output
            if own is not None and func in _SAME and isinstance(output, Tensor):
                return cls.of(plain, own.spread)
            if own is not None and func in _REPEATS:
                return own.spread(plain)
            for value in args:
                if isinstance(value, cls):
                    value.spread(None)
            return plain

    @classmethod
    def _added(cls, terms: Any) -> list[Tensor] | None:
        """The two terms of a sum, the shared one in copies; None where it is no such sum."""
        for own, other in (terms, terms[::-1]):
            rows = isinstance(other, Tensor) and not isinstance(other, cls) and other.dim()
            if isinstance(own, cls) and rows and other.shape[1:] == own.shape:
                copies = own.spread(own.as_subclass(Tensor).expand(other.shape))
                return [copies if term is own else term for term in terms]
        return None


_ADDS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_REPEATS = {Tensor.repeat, Tensor.expand}
_SAME = {Tensor.to, Tensor.contiguous}
_LOOKS = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.requires_grad.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.is_floating_point,
}
