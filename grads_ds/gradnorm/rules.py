"""Decides how each module's own parameters are measured, by what the module computes rather than by
its name.

Runs once, when a recorder is made, on the model's structure alone: modules are tried on small
random inputs with random weights, so that nothing is gathered under ZeRO-3 and every rank decides
alike. Rules:
  linear     y = W x + b, W stored either way round (nn.Linear, GPT-2's Conv1D)
  embedding  nn.Embedding and its subclasses (scaled, offset: the lookup itself is intercepted)
  norm       y = xhat * w (+ b) or xhat * (1 + w), RMS or centred
  local      anything else: the module is run again by itself, once per sample, and differentiated
             (always exact); for experts kept
             as a list of modules, each of which sees rows of no known sample, the block that routes
             to them
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas.norm import normalise
from grads_ds.gradnorm.groups import full_shape, group_of, parse_layers

_MAX_PROBE = 2**27
_ONE_OF_EXPERTS = re.compile(r"(?:^|(.*)\.)experts?\.\d+(?:\..*)?$")


@dataclass(frozen=True)
class Site:
    """A module whose parameters are measured.

    `parameters`: name in the module -> full name (the first one, if shared).
    """

    name: str
    module: nn.Module
    rule: str
    parameters: dict[str, str]
    transposed: bool = False  # linear: the weight is stored [in, out]
    eps: float = 0.0  # norm
    centred: bool = False  # norm


@dataclass(frozen=True)
class SitePlan:
    """What a recorder measures: sites, each parameter's group, and the two ends of the model."""

    sites: tuple[Site, ...]
    groups: dict[str, str]  # full parameter name -> group
    requested: tuple[str, ...]
    embedding: nn.Module
    head: nn.Module
    tied: bool


def plan_sites(model: nn.Module, layers: str | tuple[str, ...] | list[str]) -> SitePlan:
    """Finds every parameter of the requested groups and the rule for it.

    Raises ValueError for what cannot be recorded.
    """
    requested = parse_layers(layers)
    for module in model.modules():
        if (
            type(module).__name__ == "OptimizedModule"
            or getattr(module, "_compiled_call_impl", None) is not None
        ):
            raise ValueError(
                "gradient norms are read by hooks, which torch.compile removes; pass the model"
                " before it is compiled"
            )
    embedding, head = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    table, head_weight = getattr(embedding, "weight", None), getattr(head, "weight", None)
    first_name: dict[int, str] = {}
    groups: dict[str, str] = {}
    sites = []
    for path, module in model.named_modules():
        own: dict[str, str] = {}
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = first_name.setdefault(id(parameter), f"{path}.{local}" if path else local)
            if name not in groups:
                groups[name] = group_of(
                    name, module, parameter is table, parameter is head_weight or module is head
                )
            own[local] = name
        if own:
            sites.append((path, module, own))
    tied = table is not None and table is head_weight
    wanted = set(requested) | ({"embedding"} if tied and "lm_head" in requested else set())
    kept = []
    # path of a block that routes to a list of experts -> their parameters
    experts: dict[str, dict[str, str]] = {}
    for path, module, own in sites:
        own = {local: name for local, name in own.items() if groups[name] in wanted}
        if own and (found := _ONE_OF_EXPERTS.match(path)):
            block = found[1] or ""
            inside = path.removeprefix(f"{block}.") if block else path
            experts.setdefault(block, {}).update(
                {f"{inside}.{local}": name for local, name in own.items()}
            )
        elif own:
            kept.append(_site(path, module, own))
    kept += [
        Site(f"{block}.experts", model.get_submodule(block), "local", own)
        for block, own in experts.items()
    ]
    groups = {name: group for name, group in groups.items() if group in wanted}
    return SitePlan(tuple(kept), groups, requested, embedding, head, tied)


def head_name(model: nn.Module, plan: SitePlan, local: str) -> str | None:
    """The full name of the head's "weight" or "bias", if it is to be measured."""
    own = getattr(plan.head, local, None)
    return next((n for n, p in model.named_parameters() if p is own and n in plan.groups), None)


def _end(model: nn.Module, getter: str) -> nn.Module:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"the model must offer {getter}() as Hugging Face causal language models do;"
            f" {type(model).__name__} does not"
        )
    return found


def _site(path: str, module: nn.Module, own: dict[str, str]) -> Site:
    if isinstance(module, nn.Embedding) and set(own) == {"weight"}:
        return Site(path, module, "embedding", own)
    if type(module).forward is nn.Linear.forward:
        return Site(path, module, "linear", own)
    tensors = {
        local: parameter for local, parameter in module._parameters.items() if parameter is not None
    }
    if set(tensors) <= {"weight", "bias"} and "weight" in tensors and not list(module.children()):
        shape = full_shape(tensors["weight"])
        if shape.numel() <= _MAX_PROBE:
            # a module that cannot be run on plain tensors is no linear and no norm
            with contextlib.suppress(Exception):
                transposed = _linear_kind(module, tensors, shape) if len(shape) == 2 else None
                if transposed is not None:
                    return Site(path, module, "linear", own, transposed)
            with contextlib.suppress(Exception):
                found = _norm_kind(module, tensors, shape)
                if found is not None:
                    return Site(path, module, "norm", own, False, *found)
    return Site(path, module, "local", own)


@contextlib.contextmanager
def substituted(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The module with some of its parameters replaced for a while, by their names in it."""
    kept = {local: parameter_at(module, local) for local in tensors}
    try:
        for local, tensor in tensors.items():
            place, name = _held(module, local)
            place[name] = tensor
        yield
    finally:
        for local, parameter in kept.items():
            place, name = _held(module, local)
            place[name] = parameter


def parameter_at(module: nn.Module, local: str) -> Tensor:
    """The module's parameter of that name, or what stands in for it."""
    place, name = _held(module, local)
    return place[name]


def _held(module: nn.Module, local: str) -> tuple[dict[str, Any], str]:
    path, _, name = local.rpartition(".")
    return module.get_submodule(path)._parameters, name


def _random(tensors: dict[str, Tensor], *shape: int) -> tuple[dict[str, Tensor], Tensor]:
    device = next(iter(tensors.values())).device
    generator = torch.Generator().manual_seed(0)
    fake = {
        local: torch.randn(full_shape(t), generator=generator).to(device)
        for local, t in tensors.items()
    }
    return fake, torch.randn(*shape, generator=generator).to(device)


def _matches(output: object, expected: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.shape == expected.shape
        and torch.allclose(output.float(), expected, 1e-4, 1e-4)
    )


@torch.no_grad()
def _linear_kind(module: nn.Module, tensors: dict[str, Tensor], shape: torch.Size) -> bool | None:
    """Whether the weight is stored [in, out], if the module computes W x + b; else None."""
    for transposed in (False, True):
        fake, acts = _random(tensors, 2, 3, shape[0] if transposed else shape[1])
        with contextlib.suppress(Exception), substituted(module, fake):
            expected = acts @ (fake["weight"] if transposed else fake["weight"].T)
            if _matches(
                module.forward(acts), expected + fake["bias"] if "bias" in fake else expected
            ):
                return transposed
    return None


@torch.no_grad()
def _norm_kind(
    module: nn.Module, tensors: dict[str, Tensor], shape: torch.Size
) -> tuple[float, bool] | None:
    """(eps, centred) if the module normalises its last dimension and scales it by its weight, else
    None.
    """
    fake, acts = _random(tensors, 2, 3, *shape)
    acts = acts * 1e-2 + 1e-3  # small, so that a wrong eps shows
    names = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
    eps_values = {
        float(getattr(module, name))
        for name in names
        if isinstance(getattr(module, name, None), float)
    }
    with substituted(module, fake):
        output = module.forward(acts)
    bias = fake.get("bias", torch.zeros(()).to(acts.device))
    for eps in sorted(eps_values | {1e-5, 1e-6, 1e-8, torch.finfo(torch.float32).eps}):
        for centred in (False, True):
            for offset in (0.0, 1.0):
                if _matches(
                    output, normalise(acts, eps, centred) * (offset + fake["weight"]) + bias
                ):
                    return eps, centred
    return None
