"""A base model whose linear layers are held in 4 bits while adapters train (QLoRA, arXiv
2305.14314): how it is loaded, and which numbers its weights stand for.

The weights are NF4 with quantized scales (bitsandbytes). A layer computes with the numbers that
they stand for, in `model.dtype`; these numbers, and not those of the base model's files, are what a
trained model holds beside its adapters. Head and embeddings stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.workarounds import without_sharded_loading


def four_bit_loading(model: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is given beside the rest; nothing unless `model.lora` asks for 4 bits.

    Modules that are trained whole are not quantized.
    """
    if model.lora is None or not model.lora.load_in_4bit:
        return {}
    whole = list(model.lora.modules_to_save)
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
            # a list replaces transformers' own
            llm_int8_skip_modules=whole + _never_quantized(model) if whole else None,
        )
    }


def stands_for(weight: torch.Tensor) -> torch.Tensor:
    """The numbers of a weight [out, in]: those that a 4-bit one stands for, another one itself."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def without_quantization(shape: Any) -> Any:
    """A model's config as it is for weights that are whole numbers again; `shape` stays."""
    shape = type(shape).from_dict(shape.to_dict())
    if hasattr(shape, "quantization_config"):
        del shape.quantization_config
    return shape


def _never_quantized(model: ModelConfig) -> list[str]:
    """The head, and what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    remote = model.trust_remote_code
    shape = AutoConfig.from_pretrained(model.path, trust_remote_code=remote)
    with without_sharded_loading(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(shape, trust_remote_code=remote)
    return list(get_keys_to_not_convert(empty))
