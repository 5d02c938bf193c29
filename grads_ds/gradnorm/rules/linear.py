"""Linear layers: y = W x + b, W stored either way round (nn.Linear, GPT-2's Conv1D)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas import linear
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.rules.random_inputs import matches, random_like, weight_and_bias
from grads_ds.gradnorm.sites import Site, substituted


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """details: whether the weight is stored [in, out]."""
    if type(module).forward is nn.Linear.forward and set(own) <= {"weight", "bias"}:
        return Site(name, module, "linear", own, False)
    tensors = weight_and_bias(module)
    if tensors is None or len(full_shape(tensors["weight"])) != 2:
        return None
    transposed = _transposed(module, tensors)
    return None if transposed is None else Site(name, module, "linear", own, transposed)


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the layer's input and the gradient of its output."""

    def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
        rows = measurement.rows(site, saved[0], grads[0])
        if rows is None:
            return
        acts_SLI, grads_SLO = rows[0].flatten(1, -2), rows[1].flatten(1, -2)
        for local, name in site.parameters.items():
            if local == "weight":
                _weight(site, measurement, name, acts_SLI, grads_SLO)
            else:
                measurement.add_vector(name, lambda: linear.accumulate(grads_SLO).sum(1))

    return measurement.behind(site, sink)


def _weight(
    site: Site, measurement: Measurement, name: str, acts_SLI: Tensor, grads_SLO: Tensor
) -> None:
    def norm_squared(uses: list[tuple[Tensor, ...]]) -> Tensor:
        # a weight used several times: the tokens of all its uses are those of one longer sample
        acts, grads = (torch.cat(t, 1) if len(t) > 1 else t[0] for t in zip(*uses, strict=True))
        return measurement.weight_squares(acts, grads)

    measurement.add_use(name, (acts_SLI, grads_SLO), norm_squared)
    measurement.compare(
        name, lambda r: linear.weight_inner(acts_SLI, grads_SLO, r.T if site.details else r)
    )
    if name in measurement.gradients:
        gradient = measurement.gradients[name]
        gradient_OI = gradient.T if site.details else gradient
        linear.add_weight_gradient(gradient_OI, acts_SLI, grads_SLO)


@torch.no_grad()
def _transposed(module: nn.Module, tensors: dict[str, Any]) -> bool | None:
    """Whether the weight is stored [in, out], if the module computes W x + b; else None."""
    shape = full_shape(tensors["weight"])
    for transposed in (False, True):
        fake, acts = random_like(tensors, 2, 3, shape[0] if transposed else shape[1])
        # a module that cannot be run on plain tensors is no linear layer
        with contextlib.suppress(Exception), substituted(module, fake):
            expected = acts @ (fake["weight"] if transposed else fake["weight"].T)
            expected = expected + fake["bias"] if "bias" in fake else expected
            if matches(module.forward(acts), expected):
                return transposed
    return None
