"""Depthwise convolutions over tokens: nn.Conv1d with one input channel per group, as state space
models have in front of their recurrences; rows of the batch are samples.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from grads_ds.gradnorm.formulas import convolution
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.sites import Site


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """A depthwise convolution with steps of one and zeros for padding."""
    if not isinstance(module, nn.Conv1d) or type(module).forward is not nn.Conv1d.forward:
        return None
    depthwise = module.groups == module.in_channels == module.out_channels
    plain = module.stride == module.dilation == (1,) and module.padding_mode == "zeros"
    if not depthwise or not plain or isinstance(module.padding, str):
        return None
    return Site(name, module, "convolution", own)


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the layer's input [B, C, T] and the gradient of its output."""
    module = site.module
    assert isinstance(module, nn.Conv1d)
    taps, padding = int(module.kernel_size[0]), int(module.padding[0])

    def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
        acts, layout = saved[0], measurement.layout
        if acts.dim() != 3 or len(acts) != layout.rows or layout.packed_index is not None:
            measurement.unmeasured.update(site.parameters.values())
            return
        for local, name in site.parameters.items():
            if local == "weight":
                measurement.add_vector(
                    name, lambda: convolution.tap_gradient(acts, grads[0], taps, padding)
                )
            else:
                measurement.add_vector(name, lambda: convolution.shift_gradient(grads[0]))

    return measurement.behind(site, sink)
