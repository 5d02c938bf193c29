"""The rules, in the order in which they are tried. A new kind of layer: one file here, one in
`formulas/`, one line below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from grads_ds.gradnorm.measure.lookup import looked_up, requiring_grad
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.rules import (
    convolution,
    embedding,
    experts,
    linear,
    norm,
    rerun,
    scale,
    shared,
)
from grads_ds.gradnorm.sites import Site

RULES = {
    "embedding": embedding,
    "linear": linear,
    "scale": scale,
    "norm": norm,
    "convolution": convolution,
    "experts": experts,
    "shared": shared,
    "rerun": rerun,
}


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site:
    """The site of the first rule that recognises the module. own: its parameters, by full name."""
    for rule in RULES.values():
        site = rule.recognise(name, module, own)
        if site is not None:
            return site
    raise AssertionError("the last rule takes every module")


@contextlib.contextmanager
def attached(measurement: Measurement, sites: Sequence[Site]) -> Iterator[None]:
    """Hooks the sites for the duration. The model itself is unchanged afterwards."""
    with contextlib.ExitStack() as stack:
        source = measurement.plan.embedding
        if measurement.grad_root is not None and not measurement.starts_at_sites:
            looks_up = any(site.module is source and site.rule == "embedding" for site in sites)
            if not looks_up:
                hook = requiring_grad(measurement.grad_root)
                stack.enter_context(looked_up(source, hook))
        for site in sites:
            stack.enter_context(RULES[site.rule].attach(site, measurement))
        yield
