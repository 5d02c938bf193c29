"""A module run again by itself, with stand-ins for its parameters, and differentiated."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.sites import Site, substituted


@dataclass(frozen=True)
class Alone:
    """A module that is run by itself: its site, what runs it, and which of its outputs are
    differentiated.
    """

    site: Site
    call: Callable[[list[Tensor]], Any]
    positions: list[int]

    def outputs(
        self, whole: dict[str, Tensor], inputs: list[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the stand-ins for the parameters that they were computed with."""
        # parameters, for a module may take them for its own and hand them on (parametrizations)
        leaves: dict[str, Tensor] = {name: nn.Parameter(tensor) for name, tensor in whole.items()}
        with torch.enable_grad():
            return self.run(leaves, inputs), leaves

    def run(self, tensors: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The outputs, with these tensors by full name in the parameters' places."""
        stand_ins = {local: tensors[name] for local, name in self.site.parameters.items()}
        with substituted(self.site.module, stand_ins):
            outputs = self.call(inputs)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return [outputs[position] for position in self.positions]

    def differentiated(
        self, outputs: list[Tensor], leaves: dict[str, Tensor], grads: list[Tensor]
    ) -> dict[str, Tensor]:
        """The parameters' gradients, given the outputs'."""
        pairs = []
        for output, grad in zip(outputs, grads, strict=True):
            if output.shape != grad.shape:
                raise RuntimeError(
                    f"{self.site.name} gave {tuple(output.shape)} when run again for one sample,"
                    f" where {tuple(grad.shape)} was expected; record it with other layers left out"
                )
            if output.requires_grad:
                pairs.append((output, grad.to(output.dtype)))
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                list(leaves.values()),
                [grad for _, grad in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }

    def gradients(
        self, whole: dict[str, Tensor], inputs: list[Tensor], grads: list[Tensor]
    ) -> dict[str, Tensor]:
        """The parameters' gradients of one sample."""
        return self.differentiated(*self.outputs(whole, inputs), grads)


@contextlib.contextmanager
def isolated(
    module: nn.Module, call: Callable[[list[Tensor]], Any], inputs: list[Tensor]
) -> Iterator[None]:
    """While active, `module` can be run again any number of times without a word to those who hook
    its children.

    Where parameters of its children are taken apart (ZeRO-3), one ordinary run on `inputs` lets
    whoever took them apart make each whole in its turn, as in the recomputation of a checkpoint;
    copies of them serve the runs that follow. It is one run whatever the number of samples, so that
    ranks with more of them do not fall out of step.
    """
    children = [m for m in module.modules() if m is not module]
    kept = [(m, m._forward_pre_hooks, m._forward_hooks, dict(m._parameters)) for m in children]
    copies: dict[nn.Module, dict[str, Tensor]] = {}
    if any(
        p is not None and p.shape != full_shape(p) for _, _, _, own in kept for p in own.values()
    ):

        def copy(child: nn.Module, args: Any) -> None:
            copies[child] = {
                local: p.detach().clone() for local, p in child._parameters.items() if p is not None
            }

        handles = [m.register_forward_pre_hook(copy) for m in children]
        with torch.no_grad():
            call(inputs)
        for handle in handles:
            handle.remove()
    try:
        for m, *_ in kept:
            m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
            m._parameters.update(copies.get(m, {}))  # type: ignore[arg-type]
        yield
    finally:
        for m, before, after, own in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after
            m._parameters.update(own)


@contextlib.contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Whatever the module and those in it set on themselves meanwhile is undone: a run that fails
    midway, or on tensors that live no longer than it does, leaves nothing behind.
    """
    kept = []
    for part in module.modules():
        tables = (part._parameters, part._buffers, part._modules)
        kept.append((part, type(part), dict(vars(part)), [(t, dict(t)) for t in tables]))
    try:
        yield
    finally:
        for part, kind, attributes, entries_of in kept:
            object.__setattr__(part, "__class__", kind)
            vars(part).clear()
            vars(part).update(attributes)
            for table, entries in entries_of:
                table.clear()
                table.update(entries)
