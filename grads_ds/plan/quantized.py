"""How much of a base model is held in 4 bits while adapters train (`model.lora.load_in_4bit`)."""

from __future__ import annotations

from typing import Any

import torch

from grads_ds.config.model_and_data import LoraConfig
from grads_ds.plan.shapes import on_meta

# bytes of an element in NF4: half a byte, a scale of one byte for 64, a scale of these for 256
FOUR_BIT = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def quantized_elements(config: Any, lora: LoraConfig | None) -> int:
    """Elements of the base that `model.lora` holds in 4 bits: the linear layers' weights but the
    head's and those of modules trained whole.
    """
    if lora is None or not lora.load_in_4bit:
        return 0
    counts = []
    for layers in (1, 2):
        model = on_meta(config, torch.bfloat16, layers)
        counts.append(
            sum(
                module.weight.numel()
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
                and module is not model.get_output_embeddings()
                and not set(name.split(".")) & set(lora.modules_to_save)
            )
        )
    return counts[0] + (config.num_hidden_layers - 1) * (counts[1] - counts[0])
