"""What a rank may still take of its device's memory, and what something takes of it at most."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grads_ds.distributed.device import device
from grads_ds.engine.live_bytes import LiveBytes
from grads_ds.engine.memory_shares import USABLE


def free_bytes() -> float:
    """Bytes that this rank may still take: of its GPU, or its share of the host's memory."""
    if device().type == "cuda":
        total = torch.cuda.get_device_properties(device()).total_memory
        return USABLE * total - torch.cuda.memory_allocated()
    with open("/proc/meminfo") as lines:
        known = {line.split(":")[0]: float(line.split()[1]) * 1024 for line in lines}
    return USABLE * known["MemAvailable"] / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_bytes(run: Callable[[], Any], model: nn.Module) -> float:
    """Bytes that `run()` takes at most, above what is taken before it; `model`'s parameters, or
    this rank's shards of them, are there before.
    """
    cuda = device().type == "cuda"
    counter = LiveBytes(device().type)
    for parameter in model.parameters():
        counter.ignore(parameter.data)
        counter.ignore(getattr(parameter, "ds_tensor", parameter.data))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with contextlib.nullcontext() if cuda else counter:
        run()
    return float(torch.cuda.max_memory_allocated() - before if cuda else counter.peak)
