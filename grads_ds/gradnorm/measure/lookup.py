"""Intercepts the table lookup inside an embedding module, whatever the module does around it
(scales it, offsets its ids).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grads_ds.gradnorm.measure.tap import tap

LookupHook = Callable[[Tensor, Tensor], Tensor]  # (ids, output) -> the output to go on with


def requiring_grad(anchor: Tensor) -> LookupHook:
    """A hook that makes the looked-up rows require grad: how a model is differentiated while its
    parameters are frozen.
    """
    return lambda ids, output: tap((output,), (), lambda grads, saved: None, anchor)[0]


class _LookupMode(TorchFunctionMode):
    """Passes every table lookup through `hook(ids, output)`; all other functions are left alone."""

    def __init__(self, hook: LookupHook) -> None:
        super().__init__()
        self.hook = hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.embedding:
            return self.hook(args[0] if args else (kwargs or {})["input"], output)
        return output


@contextlib.contextmanager
def looked_up(module: nn.Module, hook: LookupHook) -> Iterator[None]:
    """While active, the lookup inside `module` (scaled and offset subclasses too) goes through
    `hook`. Deep copies of the module made meanwhile are left alone.
    """
    active: list[_LookupMode] = []

    def begin(called: nn.Module, args: Any) -> None:
        if called is module:
            active.append(_LookupMode(hook))
            active[-1].__enter__()

    def end(called: nn.Module, args: Any, output: Any) -> None:
        if called is module and active:
            active.pop().__exit__(None, None, None)

    before = module.register_forward_pre_hook(begin)
    behind = module.register_forward_hook(end, prepend=True, always_call=True)
    try:
        yield
    finally:
        before.remove()
        behind.remove()
