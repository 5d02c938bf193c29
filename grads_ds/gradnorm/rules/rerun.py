"""Modules of any other kind (routers, fused experts, attention sinks, a whole block): run again by
themselves, once per sample, and differentiated. Always exact where the rows of the module's outputs
can be told apart by sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.measure.module_alone import local_norms_squared
from grads_ds.gradnorm.measure.module_state import Kept, Snapshot, changed_since, put_back, snapshot
from grads_ds.gradnorm.measure.run_again import isolated
from grads_ds.gradnorm.measure.tap import tap
from grads_ds.gradnorm.sharding import gathered
from grads_ds.gradnorm.sites import Site, parameter_at

# else they would be filled twice
_CACHES = ("past_key_values", "past_key_value", "cache_params", "cache", "layer_past")


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """Takes every module. details: False where the inputs must stay whole (see module_alone)."""
    return Site(name, module, "rerun", own, True)


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the module's inputs and the gradients of its outputs."""
    return hooked(site, measurement, _sink)


def hooked(
    site: Site, measurement: Measurement, sink: Callable[..., None]
) -> AbstractContextManager[None]:
    """Hooks a module of any signature, called once: in the backward sink(again, places of outputs,
    their gradients, tensors among the arguments).
    """
    plan = measurement.plan
    if _drops(site.module):
        measurement.unmeasured.update(
            site.parameters.values()
        )  # it would drop others when run again
        return contextlib.nullcontext()
    ends = {plan.head, plan.embedding} - {site.module}
    if any(module in ends for module in site.module.modules()):
        # (nearly) the whole model: too much to be run again alone
        measurement.unmeasured.update(site.parameters.values())
        return contextlib.nullcontext()

    before: list[Snapshot] = []

    def begin(module: nn.Module, args: Any) -> None:
        if module is site.module and not measurement.replaying:
            before[:] = [snapshot(module)]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if measurement.replaying:
            return output
        measurement.called(site)
        outputs = output if isinstance(output, tuple) else (output,)
        if measurement.calls[site.name, site.rule] > 1 or not all(
            o is None or isinstance(o, Tensor) for o in outputs
        ):
            # the cross term of two calls is not known; gradients may come back where no tap can be
            measurement.unmeasured.update(site.parameters.values())
            return output
        rooted = measurement.root_of_sites is not None
        which = [
            i
            for i, o in enumerate(outputs)
            if isinstance(o, Tensor) and o.is_floating_point() and (rooted or o.requires_grad)
        ]
        if not which or not torch.is_grad_enabled():
            return output
        kept = changed_since(before.pop()) if before else []
        again = Again(site, measurement, args, kwargs, outputs[which[0]].device.type, kept)
        tapped = tap(
            tuple(outputs[i] for i in which),
            again.given(),
            lambda grads, saved: sink(again, which, grads, saved),
            measurement.root_of_sites,
        )
        if not isinstance(output, tuple):
            return tapped[0]
        replaced = list(output)
        for position, tensor in zip(which, tapped, strict=True):
            replaced[position] = tensor
        return tuple(replaced) if type(output) is tuple else type(output)(*replaced)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        handle = site.module.register_forward_pre_hook(begin, prepend=True)
        try:
            with measurement.hooked(site.module, hook):
                yield
        finally:
            handle.remove()

    return both()


def _drops(module: nn.Module) -> bool:
    """Whether the module leaves out values at random."""

    def rate(part: nn.Module) -> float:
        named = [v for name, v in vars(part).items() if "drop" in name and isinstance(v, float)]
        return max([part.p if isinstance(part, nn.Dropout) else 0.0, *named])

    return any(part.training and rate(part) > 0 for part in module.modules())


class Again:
    """One call of a module, to be repeated in the backward: its arguments, and what the module kept
    of its last call, without their tensors, which autograd keeps.
    """

    def __init__(
        self,
        site: Site,
        measurement: Measurement,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: str,
        kept: Sequence[Kept] = (),
    ) -> None:
        self.site, self.measurement, self.device = site, measurement, device
        self.leaves, self.structure = pytree.tree_flatten((args, kwargs))
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.filled = [one.value is not None for one in kept]
        self._state = [one.value for one in kept]
        self.kept = [replace(one, value=None) for one in kept]
        self.mixed = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def call(self, tensors: list[Tensor]) -> Any:
        """The module's forward, as the first time, on these tensors."""
        values, state = list(self.constants), iter(tensors[len(self.places) :])
        for place, tensor in zip(self.places, tensors, strict=False):
            values[place] = tensor
        kept = [next(state) if filled else None for filled in self.filled]
        args, kwargs = pytree.tree_unflatten(values, self.structure)
        kwargs = {k: None if k in _CACHES else v for k, v in kwargs.items()}
        mixed = torch.autocast(self.device, self.dtype, self.mixed)
        with mixed, put_back(self.kept, kept):
            return self.site.module.forward(*args, **kwargs)

    def given(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments and of the last call, which autograd alone is to keep
        from here on.
        """
        tensors = tuple(self.leaves[place] for place in self.places)
        tensors += tuple(value for value in self._state if value is not None)
        self.leaves, self._state = [], []
        return tensors

    def measured(
        self, inputs: list[Tensor], find: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
    ) -> None:
        """Adds the squares that find(whole parameters by path) gives by full name, [S] each; None
        leaves the site unmeasured.
        """
        site, measurement = self.site, self.measurement
        measurement.replaying = True
        try:
            whole = gathered(list(site.module.parameters(recurse=False)), measurement.gather)
            with whole, isolated(site.module, self.call, inputs):
                found = find({local: parameter_at(site.module, local) for local in site.parameters})
        finally:
            measurement.replaying = False
        if found is None:
            measurement.unmeasured.update(site.parameters.values())
            return
        for name, squares_S in found.items():
            measurement.add(name, squares_S)


def _sink(
    again: Again, which: list[int], grads: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]
) -> None:
    """Squared norms of a site's parameters, from the gradients of its outputs at `which`."""
    measurement, inputs = again.measurement, list(saved)
    reached = [(i, grad) for i, grad in zip(which, grads, strict=True) if grad is not None]
    again.measured(
        inputs,
        lambda own: local_norms_squared(
            again.site, own, again.call, inputs, reached, measurement.layout, measurement.take
        ),
    )
