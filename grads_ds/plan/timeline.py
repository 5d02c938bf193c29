"""What happens in one micro-batch, event by event: when modules want their weights, when gradients
come, how much is alive between.

Runs the model's own code on the meta device: no weights, any size. A few layers are run, and the
events of one repeated for all that are equal. The hooks sit where DeepSpeed's ZeRO-3 has its own
(seen in 0.19.8, runtime/zero/parameter_offload.py): before and after each module's forward, at its
outputs' and its inputs' gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from grads_ds.engine.live_bytes import LiveBytes

Name = tuple[int | None, str]  # (layer, name in it), or (None, name) outside the repeated layers


@dataclass(frozen=True)
class Weight:
    """Elements of a parameter, and whether it is trained."""

    numel: int
    trained: bool


@dataclass(frozen=True)
class Event:
    """kind: fetch or release (of a module's own weights), gradient (of one weight), or head (the
    recorder's own pass, which takes `head` bytes). by_gradient: in a hook of the backward pass;
    in_backward: while it runs (a checkpoint's second forward is in it). net, peak: bytes of
    activations, change since the last event and the most that stood above it.
    """

    kind: str
    module: Name
    weights: tuple[Name, ...]
    by_gradient: bool
    in_backward: bool
    net: int
    peak: int
    head: int = 0


@dataclass(frozen=True)
class Timeline:
    """All events of a micro-batch in order, and the model's parameters."""

    events: list[Event]
    weights: dict[Name, Weight]


class _Mark(torch.autograd.Function):
    """Calls `call` when the gradient of `tensor` passes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.call()
        return grad, None


class EventTracer:
    """Notes the events of `model` while `counter` counts; call `backward_begins` between the
    passes.
    """

    def __init__(self, model: nn.Module, counter: LiveBytes) -> None:
        self.counter, self.in_backward = counter, False
        self.events: list[Event] = []
        self._last = 0
        layers = max(
            (m for m in model.named_modules() if isinstance(m[1], nn.ModuleList)),
            key=lambda m: len(m[1]),
        )[0]
        self._layer = re.compile(re.escape(layers) + r"\.(\d+)(?:\.|$)")
        self.weights = {
            self._name(name): Weight(p.numel(), p.requires_grad)
            for name, p in model.named_parameters()
        }
        named = {id(p): self._name(name) for name, p in model.named_parameters()}
        for path, module in model.named_modules():
            own = tuple(dict.fromkeys(named[id(p)] for p in module.parameters(recurse=False)))
            self._hook(module, self._name(path), own)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._taken(named[id(parameter)]))

    def head_runs(self, size: int) -> None:
        """The recorder's pass over the head, with `size` bytes of its own."""
        self._note("head", (None, ""), (), False, head=size)

    def backward_begins(self) -> None:
        """From here on the backward pass runs."""
        self.in_backward = True

    def _name(self, path: str) -> Name:
        found = self._layer.search(path)
        return (
            (int(found[1]), path[: found.start()] + "." + path[found.end() :])
            if found
            else (None, path)
        )

    def _note(
        self,
        kind: str,
        module: Name,
        weights: tuple[Name, ...],
        by_gradient: bool,
        leaving: int = 0,
        head: int = 0,
    ) -> None:
        counter = self.counter
        now = counter.now - leaving
        net, peak = now - self._last, max(0, counter.peak - self._last)
        self.events.append(
            Event(kind, module, weights, by_gradient, self.in_backward, net, peak, head)
        )
        self._last = counter.peak = now

    def _hook(self, module: nn.Module, name: Name, own: tuple[Name, ...]) -> None:
        inputs = outputs = 0

        def before_backward() -> None:
            nonlocal outputs
            if outputs > 0:
                outputs -= 1
                self._note("fetch", name, own, True)

        def after_backward() -> None:
            nonlocal inputs
            inputs -= 1
            if inputs == 0:
                self._note("release", name, own, True)

        def enters(value: Any) -> Any:
            nonlocal inputs
            if not torch.is_tensor(value) or not value.requires_grad:
                return value
            inputs += 1
            return _Mark.apply(value, after_backward)

        def leaves(value: Any) -> Any:
            nonlocal outputs
            if not torch.is_tensor(value):
                return value
            outputs += 1
            return _Mark.apply(value, before_backward) if value.requires_grad else value

        def before_forward(module: nn.Module, args: Any) -> Any:
            nonlocal inputs
            self._note("fetch", name, own, False)
            inputs = 0
            return tree_map(enters, args)

        def after_forward(module: nn.Module, args: Any, output: Any) -> Any:
            self._note("release", name, own, False)
            return tree_map(leaves, output)

        module.register_forward_pre_hook(before_forward)
        module.register_forward_hook(after_forward)

    def _taken(self, name: Name) -> Callable[[torch.Tensor], None]:
        def taken(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            size, before = parameter.grad.nbytes, self.counter.now
            parameter.grad = None  # what becomes of it depends on ZeRO's stage: not counted here
            self._note("gradient", name, (name,), True, leaving=size - (before - self.counter.now))

        return taken


def repeat_layers(
    events: Iterable[Event], weights: Mapping[Name, Weight], copies: Sequence[int]
) -> Timeline:
    """The timeline of a whole model from that of one of few layers, of which the i-th stands for
    `copies[i]` equal ones in a row.
    """
    starts = [sum(copies[:i]) for i in range(len(copies))]
    found: list[Event] = []
    for layer, run in groupby(events, key=lambda event: event.module[0]):
        own = list(run)
        if layer is None:
            found += own
            continue
        order = range(starts[layer], starts[layer] + copies[layer])
        for number in reversed(order) if own[0].in_backward else order:
            found += [_moved(event, number) for event in own]
    return Timeline(found, dict(_copies(weights, sum(copies))))


def _moved(event: Event, layer: int) -> Event:
    names = tuple((layer if name[0] is not None else None, name[1]) for name in event.weights)
    return replace(event, module=(layer, event.module[1]), weights=names)


def _copies(weights: Mapping[Name, Weight], layers: int) -> Iterator[tuple[Name, Weight]]:
    for (layer, name), weight in weights.items():
        # in the model's order: name by name of the layers
        if layer is None:
            yield (layer, name), weight
        elif layer == 0:
            yield from (((number, name), weight) for number in range(layers))
