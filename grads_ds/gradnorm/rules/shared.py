"""Modules whose one output, [1, ...], is the same for all samples and is repeated for each of them
afterwards (PEFT's prompt encoders): the gradients are read behind the repetition.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.measure.module_alone import shared_norms_squared
from grads_ds.gradnorm.measure.shared_tensor import SharedTensor
from grads_ds.gradnorm.measure.tap import tap
from grads_ds.gradnorm.rules.rerun import Again
from grads_ds.gradnorm.sites import Site


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """None: only a trial of the model shows that samples share an output."""
    return None


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the gradient of every sample's own copy of the output."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if measurement.replaying:
            return output
        measurement.called(site)
        if measurement.calls[site.name, site.rule] > 1 or not isinstance(output, Tensor):
            measurement.unmeasured.update(site.parameters.values())
            return output
        if not torch.is_grad_enabled():
            return output
        again = Again(site, measurement, args, kwargs, output.device.type)

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            rows = measurement.rows(site, grads[0])
            if rows is None:
                return
            inputs = list(saved)
            again.measured(
                inputs,
                lambda own: shared_norms_squared(
                    site, own, again.call, inputs, rows[0], measurement.take
                ),
            )

        def spread(copies: Tensor | None) -> Tensor | None:
            if copies is None or copies.shape[0] != measurement.layout.rows:
                measurement.unmeasured.update(site.parameters.values())  # used in another way
                return copies
            return tap((copies,), again.given(), sink, measurement.grad_root)[0]

        return SharedTensor.of(output, spread)

    return measurement.hooked(site.module, hook)
