"""What kind of batch a model is given: batches of one kind are laid out alike, so that what was
found out about one holds for all of them.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from grads_ds.gradnorm.batch_layout import Layout


def kind_of(model: nn.Module, layout: Layout) -> Hashable:
    """Packing, padding, coinciding sizes, precision, and which adapters are active."""
    device = layout.input_ids.device.type
    mixed = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    left = bool((layout.real[:, 1:] & ~layout.real[:, :-1]).any())
    adapters = tuple(
        (
            str(state["_active_adapter"]),
            state.get("_disable_adapters"),
            len(state["merged_adapters"]),
        )
        for state in map(vars, model.modules())
        if "_active_adapter" in state and "merged_adapters" in state
    )
    return (
        layout.packed_index is not None,
        layout.num_samples == 1,
        layout.rows == layout.length,
        left,
        layout.needs_positions,
        mixed,
        hash(adapters),
    )


def is_half(model: nn.Module, layout: Layout) -> bool:
    """Whether the model computes in a half precision here."""
    device = layout.input_ids.device.type
    halves = (torch.float16, torch.bfloat16)
    return torch.is_autocast_enabled(device) or any(p.dtype in halves for p in model.parameters())
