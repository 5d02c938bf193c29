"""Tries a module on small random inputs with random weights, so that nothing is gathered under
ZeRO-3 and every rank decides alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.groups import full_shape

_LARGEST = 2**27  # elements of a weight that is tried


def weight_and_bias(module: nn.Module) -> dict[str, Tensor] | None:
    """The module's parameters, if they are a weight and perhaps a bias, it has no children, and the
    weight is small enough to be tried; else None.
    """
    tensors = {local: p for local, p in module._parameters.items() if p is not None}
    if not set(tensors) <= {"weight", "bias"} or "weight" not in tensors or module._modules:
        return None
    if not tensors["weight"].is_floating_point():
        return None
    return tensors if full_shape(tensors["weight"]).numel() <= _LARGEST else None


def random_like(tensors: dict[str, Tensor], *shape: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random stand-ins for the parameters, whole, and random activations of `shape`."""
    device = next(iter(tensors.values())).device
    generator = torch.Generator().manual_seed(0)
    fake = {
        local: torch.randn(full_shape(t), generator=generator).to(device)
        for local, t in tensors.items()
    }
    return fake, torch.randn(*shape, generator=generator).to(device)


def matches(output: object, expected: Tensor) -> bool:
    """Whether a module gave what its formula gives."""
    return (
        isinstance(output, Tensor)
        and output.shape == expected.shape
        and torch.allclose(output.float(), expected, 1e-4, 1e-4)
    )
