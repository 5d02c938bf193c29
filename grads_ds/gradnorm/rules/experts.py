"""Experts that keep their weights in tensors of three dimensions (transformers 5): routed, called
with (hidden [N, H], experts [N, K], weights [N, K]), or repeated, with [E * N, H] (Llama 4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas.experts import (
    ExpertWeights,
    Routing,
    expert_outputs,
    expert_squares,
)
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.measure.module_alone import owner_mask
from grads_ds.gradnorm.rules import rerun
from grads_ds.gradnorm.rules.random_inputs import matches
from grads_ds.gradnorm.sharding import gathered
from grads_ds.gradnorm.sites import Site, substituted

_LARGEST = 2**24  # elements of weights that differ from expert to expert in the comparison
_FOUND: dict[Hashable, Experts | None] = {}  # by class, shapes and implementation


@dataclass(frozen=True)
class Experts:
    """routed: tokens are routed inside; else rows come repeated, expert after expert. transposed:
    weights are stored [E, in, out]. up: the name of the first layer's weight.
    """

    routed: bool
    transposed: bool
    up: str

    def weights(self, module: Any, tensors: dict[str, Tensor]) -> ExpertWeights:
        """The tensors as the formulas take them."""
        up, down = tensors[self.up], tensors["down_proj"]
        if self.transposed:
            up, down = up.mT, down.mT
        return ExpertWeights(
            up,
            down,
            tensors.get(f"{self.up}_bias"),
            tensors.get("down_proj_bias"),
            _gate(module, self.up != "up_proj"),
        )


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """details: an Experts."""
    tensors = {local: p for local, p in module._parameters.items() if p is not None}
    up = next((local for local in ("gate_up_proj", "up_proj") if local in tensors), "")
    known = {up, "down_proj", f"{up}_bias", "down_proj_bias"}
    if not up or "down_proj" not in tensors or not set(tensors) <= known:
        return None
    if any(len(full_shape(tensors[local])) != 3 for local in (up, "down_proj")):
        return None
    # layers of one class and size compute the same: tried once, for the weights may be large
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    shapes = tuple((local, tuple(full_shape(t))) for local, t in tensors.items())
    key = (type(module), shapes, implementation)
    if key not in _FOUND:
        _FOUND[key] = _tried(module, tensors, up)
    found = _FOUND[key]
    return None if found is None else Site(name, module, "experts", own, found)


def _tried(module: nn.Module, tensors: dict[str, Tensor], up: str) -> Experts | None:
    for routed in (True, False):
        for transposed in (False, True):
            found = Experts(routed, transposed, up)
            # a module that cannot be run so is no such layer
            with contextlib.suppress(Exception):
                if _computes(module, tensors, found):
                    return found
    return None


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the layer's input and routing, and the gradient of its output.

    Directions, and sequences that ranks share, need whole gradients: the module is run again.
    """
    wanted = measurement.references.keys() | measurement.gradients.keys()
    if measurement.group is not None or wanted & set(site.parameters.values()):
        return rerun.attach(site, measurement)
    return rerun.hooked(site, measurement, _sink)


def _sink(
    again: rerun.Again,
    which: list[int],
    grads: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...],
) -> None:
    site, measurement = again.site, again.measurement
    module, details, layout = site.module, site.details, measurement.layout
    grads_NH, hidden = grads[0], saved[0]
    owners = owner_mask(hidden if details.routed else _first(hidden, module, details), layout)
    if grads_NH is None or owners is None:
        measurement.unmeasured.update(site.parameters.values())
        return
    owner_N = owners.reshape(-1).masked_fill(~layout.real.reshape(-1), -1)
    tensors = {local: p for local, p in module._parameters.items() if p is not None}
    mixed = torch.autocast(again.device, again.dtype, again.mixed)
    with gathered(list(module.parameters(recurse=False)), measurement.gather), mixed:
        whole = {local: tensor.detach() for local, tensor in tensors.items()}
        weights = details.weights(module, whole)
        routing = _routing(details, saved, len(weights.up))
        found = expert_squares(
            hidden,
            grads_NH[routing.rows],
            owner_N[routing.rows % len(owner_N)],
            layout.num_samples,
            routing,
            weights,
        )
    for local, key in (
        (details.up, "up"),
        ("down_proj", "down"),
        (f"{details.up}_bias", "up_bias"),
        ("down_proj_bias", "down_bias"),
    ):
        if local in site.parameters:
            measurement.add(site.parameters[local], found[key])


def _first(hidden: Tensor, module: nn.Module, details: Experts) -> Tensor:
    """The rows of the first expert: every expert's are in the same order."""
    experts = full_shape(module._parameters["down_proj"])[0]  # type: ignore[arg-type]
    return hidden[: len(hidden) // experts]


def _routing(details: Experts, given: tuple[Tensor, ...], experts: int) -> Routing:
    rows = torch.arange(len(given[0]), device=given[0].device)
    if not details.routed:
        return Routing(rows, rows // (len(rows) // experts), None)
    index_NK, weights_NK = given[1], given[2]
    rows = rows[:, None].expand_as(index_NK)
    return Routing(rows.reshape(-1), index_NK.reshape(-1).long(), weights_NK.reshape(-1))


def _gate(module: Any, gated: bool) -> Callable[[Tensor], Tensor]:
    if not gated:
        return module.act_fn  # type: ignore[no-any-return]
    own = getattr(module, "_apply_gate", None)
    if own is not None:
        return own  # type: ignore[no-any-return]

    def gate(u: Tensor) -> Tensor:
        gate, up = u.chunk(2, dim=-1)
        return up * module.act_fn(gate)  # type: ignore[no-any-return]

    return gate


@torch.no_grad()
def _computes(module: Any, tensors: dict[str, Any], details: Experts) -> bool:
    """Whether the module gives what the formulas say, with random weights and tokens."""
    device = next(iter(tensors.values())).device
    generator = torch.Generator().manual_seed(0)
    small = sum(full_shape(t).numel() for t in tensors.values()) <= _LARGEST
    fake = {}
    for local, tensor in tensors.items():
        shape = full_shape(tensor)
        own = torch.randn(shape if small else (1, *shape[1:]), generator=generator).to(device)
        fake[local] = own.expand(shape)
    weights = details.weights(module, fake)
    experts, width = len(weights.up), weights.down.shape[1]
    tokens, per_token = 5, min(2, experts)
    rows = tokens if details.routed else tokens * experts
    hidden = torch.randn(rows, width, generator=generator).to(device)
    index_NK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :per_token].to(device)
    weights_NK = torch.rand(tokens, per_token, generator=generator).to(device)
    given = (hidden, index_NK, weights_NK) if details.routed else (hidden,)
    routing = _routing(details, given, experts)
    expected = torch.zeros_like(hidden).index_add_(
        0, routing.rows, expert_outputs(hidden, routing, weights)
    )
    with substituted(module, fake):
        found = module.forward(*given)
    scale = float(expected.abs().max())
    return isinstance(found, Tensor) and matches(found / scale, expected / scale)
