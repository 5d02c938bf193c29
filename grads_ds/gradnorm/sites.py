"""Records of what is measured where: sites (modules with the rule their parameters are measured by)
and the plan made of them. `rules/` makes sites, `trial/site_plan.py` plans.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A module whose parameters are measured.

    rule: a key of `rules.table.RULES`. parameters: path in the module -> full name (the first one,
    if shared). details: what the rule found out about the module, its own record.
    """

    name: str
    module: nn.Module
    rule: str
    parameters: dict[str, str]
    details: Any = None


@dataclass(frozen=True)
class SitePlan:
    """What a recorder measures: sites, each parameter's group, and the two ends of the model.

    head_names: "weight" and "bias" of the head -> full name, those that are measured. one_by_one:
    parameters that no rule holds for, measured one sample at a time. unused: parameters that no
    forward reads while their module is not called; their gradient is zero.
    """

    sites: tuple[Site, ...]
    groups: dict[str, str]  # full parameter name -> group
    requested: tuple[str, ...]
    embedding: nn.Module
    head: nn.Module
    tied: bool
    head_names: dict[str, str] = field(default_factory=dict)
    one_by_one: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    def body(self) -> list[Site]:
        """The sites, without the parameters that the head's own pass measures.

        A tied table stays: it is the embedding too.
        """
        names = self.of_the_head_alone()
        kept = []
        for site in self.sites:
            own = {local: name for local, name in site.parameters.items() if name not in names}
            if own and site.module is not self.head:
                kept.append(replace(site, parameters=own))
        return kept

    def of_the_head_alone(self) -> set[str]:
        """The head's parameters, but for a table that is the embedding too."""
        shared = {self.head_names.get("weight")} if self.tied else set()
        return set(self.head_names.values()) - shared


@contextlib.contextmanager
def substituted(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """The module with some of its parameters replaced for a while, by their paths in it."""
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
    """The module's parameter at that path, or what stands in for it."""
    place, name = _held(module, local)
    return place[name]


def _held(module: nn.Module, local: str) -> tuple[dict[str, Any], str]:
    path, _, name = local.rpartition(".")
    return module.get_submodule(path)._parameters, name
