"""What one forward does, module by module: which call uses which parameter, and how each call's
tensors depend on the micro-batch's samples.

Costs a few numbers per row and module: of every tensor only a fingerprint of each row is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# these read a parameter without letting a gradient through, or only its shape
_NO_USE = {
    torch.Tensor.detach,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    torch.Tensor.grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
    torch.Tensor.new_full,
    torch.Tensor.new_tensor,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
}


@dataclass
class Call:
    """One call of a module. parent: the call it was made in. inputs, outputs: fingerprints of its
    floating tensors, by place. single: it computed one tensor from one. plain: it gave tensors (or
    None) only. given_out: an output that is a parameter. again: the same call in another run.
    """

    module: nn.Module
    parent: Call | None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    single: bool = True
    plain: bool = True
    given_out: bool = False
    again: Call | None = None

    def chain(self) -> list[Call]:
        """The calls this one was made in, outermost first, and itself."""
        return [*(self.parent.chain() if self.parent is not None else []), self]


class CallLog:
    """The calls of one forward in order, and the calls that use each parameter."""

    def __init__(self, model: nn.Module, recorded: Container[str]) -> None:
        self.model, self.recorded = model, recorded
        self.names: dict[int, str] = {}  # id of a parameter -> its full name
        self._known: list[Tensor] = []  # kept, so that no id is given to another tensor
        self._name_parameters()
        self.calls: list[Call] = []
        self.uses: dict[str, list[Call | None]] = {}
        self._open: list[Call] = []

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Logs every call of the model's modules."""
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                before = module.register_forward_pre_hook(self._begin, prepend=True)
                behind = module.register_forward_hook(self._end, with_kwargs=True, prepend=True)
                stack.callback(before.remove)
                stack.callback(behind.remove)
            stack.enter_context(_UsesMode(self))
            yield

    def used(self, values: Any) -> None:
        """Notes the parameters among a function's arguments."""
        for value in values:
            if isinstance(value, list | tuple):
                self.used(value)
            elif (name := self._name_of(value)) is not None:
                self.uses.setdefault(name, []).append(self._open[-1] if self._open else None)

    def _name_of(self, value: Any) -> str | None:
        new = isinstance(value, nn.Parameter) and id(value) not in self.names
        if new and not any(value is known for known in self._known):
            self._name_parameters()  # FSDP2 puts others in their places while a module runs
            self._known.append(value)
        return self.names.get(id(value)) or None

    def _name_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.names.setdefault(id(parameter), name if name in self.recorded else "")
            self._known.append(parameter)

    def _begin(self, module: nn.Module, args: Any) -> None:
        call = Call(module, self._open[-1] if self._open else None)
        self.calls.append(call)
        self._open.append(call)

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = self._open.pop()
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        outputs = output if isinstance(output, tuple) else (output,)
        call.single = (
            len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor)
        )
        call.plain = all(value is None or isinstance(value, Tensor) for value in outputs)
        call.given_out = any(self._name_of(value) for value in outputs)
        leaves, _ = pytree.tree_flatten((args, kwargs))
        call.inputs, call.outputs = _fingerprints(leaves), _fingerprints(outputs)


class _UsesMode(TorchFunctionMode):
    """Passes every function on, and its arguments to the log."""

    def __init__(self, log: CallLog) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and func not in _NO_USE:
            self.log.used((*args, *(kwargs or {}).values()))
        return output


def _fingerprints(values: Any) -> dict[int, Tensor]:
    """Of each floating tensor one number per row: [..., W] -> [...]."""
    found = {}
    for place, value in enumerate(values):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            width = value.shape[-1]
            mix = torch.cos(1.7 * torch.arange(width, device=value.device) + 0.3)
            found[place] = torch.nan_to_num(value.detach().float().clamp(-1e4, 1e4)) @ mix
    return found
