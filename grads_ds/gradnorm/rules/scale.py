"""Layers that multiply what they compute of two inputs by a vector, y = w * f(x, gate) + c: norms
before or behind their gate, in groups or not, with any activation. The gate may be left out.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.formulas.scale import scale_gradient
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.rules import rerun
from grads_ds.gradnorm.rules.random_inputs import matches, random_like
from grads_ds.gradnorm.sites import Site, substituted


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """A module of two inputs whose one parameter is a vector that its output is linear in, entry
    by entry.
    """
    tensors = {local: p for local, p in module._parameters.items() if p is not None}
    if len(tensors) != 1 or module._modules:
        return None
    local, vector = next(iter(tensors.items()))
    if len(full_shape(vector)) != 1 or not vector.is_floating_point():
        return None
    # a module that cannot be run so is no such layer
    with contextlib.suppress(Exception):
        if _is_linear_in(module, local, vector):
            return Site(name, module, "scale", own)
    return None


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the layer's inputs and the gradient of its output."""
    return rerun.hooked(site, measurement, _sink)


def _sink(
    again: rerun.Again,
    which: list[int],
    grads: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...],
) -> None:
    site, measurement = again.site, again.measurement
    ((local, name),) = site.parameters.items()
    if grads[0] is None:
        return
    inputs = [accumulate(tensor) for tensor in saved]
    shape = full_shape(site.module._parameters[local])  # type: ignore[arg-type]
    with torch.no_grad():
        outputs = []
        for value in (1.0, 0.0):
            with substituted(site.module, {local: inputs[0].new_full(shape, value)}):
                outputs.append(again.call(inputs))
    rows = measurement.rows(site, outputs[0] - outputs[1], grads[0])
    if rows is not None:
        measurement.add_vector(name, lambda: scale_gradient(rows[0], rows[1]))


@torch.no_grad()
def _is_linear_in(module: nn.Module, local: str, vector: Tensor) -> bool:
    """Whether output = w * (output at 1 - output at 0) + output at 0, of random inputs."""
    fake, acts = random_like({local: vector}, 2, 2, 3, *full_shape(vector))
    random = fake[local]
    outputs = []
    for stand_in in (random, torch.ones_like(random), torch.zeros_like(random)):
        with substituted(module, {local: stand_in}):
            outputs.append(module.forward(*acts))
    at_random, at_one, at_zero = outputs
    changes = not torch.equal(at_one, at_zero)
    return changes and matches(at_random, random * (at_one - at_zero) + at_zero)
