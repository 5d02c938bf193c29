"""Where this rank computes."""

from __future__ import annotations

import deepspeed
import torch


def device() -> torch.device:
    """Where this rank computes."""
    accelerator = deepspeed.accelerator.get_accelerator()
    name = accelerator.current_device_name()
    return torch.device("cpu" if name.startswith("cpu") else name)
