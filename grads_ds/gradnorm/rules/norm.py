"""Normalisation layers of any class: y = xhat * w (+ b) or xhat * (1 + w), RMS or centred."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas import norm
from grads_ds.gradnorm.formulas.norm import normalise
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.rules.random_inputs import matches, random_like, weight_and_bias
from grads_ds.gradnorm.sites import Site, substituted

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")


@dataclass(frozen=True)
class Normalisation:
    """xhat = x / sqrt(mean(x^2) + eps), of x - mean(x) if centred; dims of the weight's shape."""

    eps: float
    centred: bool
    dims: int


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """details: a Normalisation."""
    tensors = weight_and_bias(module)
    if tensors is None:
        return None
    # a module that cannot be run on plain tensors is no norm
    with contextlib.suppress(Exception):
        found = _normalisation(module, tensors)
        if found is not None:
            return Site(name, module, "norm", own, found)
    return None


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the layer's input, normalises it again, and the gradient of its output."""
    kind: Normalisation = site.details

    def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
        rows = measurement.rows(site, saved[0], grads[0])
        if rows is None:
            return
        for local, name in site.parameters.items():
            if local == "weight":
                measurement.add_vector(
                    name,
                    lambda: norm.scale_gradient(
                        rows[0], rows[1], kind.dims, kind.eps, kind.centred
                    ),
                )
            else:
                measurement.add_vector(name, lambda: norm.shift_gradient(rows[1], kind.dims))

    return measurement.behind(site, sink)


@torch.no_grad()
def _normalisation(module: nn.Module, tensors: dict[str, Tensor]) -> Normalisation | None:
    """What the module does, if it normalises its last dimension and scales it by its weight."""
    shape = full_shape(tensors["weight"])
    fake, acts = random_like(tensors, 2, 3, *shape)
    acts = acts * 1e-2 + 1e-3  # small, so that a wrong eps shows
    own_eps = {
        float(getattr(module, name))
        for name in _EPS_NAMES
        if isinstance(getattr(module, name, None), float)
    }
    with substituted(module, fake):
        output = module.forward(acts)
    bias = fake.get("bias", torch.zeros(()).to(acts.device))
    for eps in sorted(own_eps | {1e-5, 1e-6, 1e-8, torch.finfo(torch.float32).eps}):
        for centred in (False, True):
            for offset in (0.0, 1.0):
                scale = offset + fake["weight"]
                if matches(output, normalise(acts, eps, centred) * scale + bias):
                    return Normalisation(eps, centred, len(shape))
    return None
