"""What distributed training wraps around a model and takes apart of it: the model itself, and its
parameters whole for a while.

Knows DeepSpeed's engine and ZeRO-3, torch's DistributedDataParallel and FSDP2, and through them
Accelerate; imports torch alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from grads_ds.gradnorm.groups import full_shape

Gather = Callable[[Sequence[nn.Parameter]], contextlib.AbstractContextManager[Any]]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DeepSpeed engine or a DistributedDataParallel.

    Raises ValueError for what hides single parameters.
    """
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if flat or has_dtensors(model):
        raise ValueError(
            "gradient norms need each parameter by itself, found them sharded by FSDP or as"
            " DTensors; make the recorder before fully_shard (FSDP2), or use DeepSpeed's ZeRO, any"
            " stage"
        )
    return model


def has_dtensors(model: nn.Module) -> bool:
    """Whether FSDP2 (fully_shard) has taken the model's parameters apart. It makes each module's
    whole while the module runs; nobody else can.
    """
    return any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def gather_of(model: nn.Module) -> Gather | None:
    """How ZeRO-3 makes parameters whole, where it has taken this model's apart; else None."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None
    # imported by whoever took them apart
    gather: Gather = sys.modules["deepspeed"].zero.GatheredParameters
    return gather


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter], gather: Gather | None) -> Iterator[None]:
    """The parameters whole.

    Those that are whole already are left alone: DeepSpeed's hooks hold them, and will free them.
    """
    apart = [parameter for parameter in parameters if parameter.shape != full_shape(parameter)]
    with gather(apart) if gather is not None and apart else contextlib.nullcontext():
        yield
