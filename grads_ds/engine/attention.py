"""Which attention implementation a model runs with, where the config leaves it open."""

from __future__ import annotations

import functools
import importlib.util

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grads_ds.config.config import Config
from grads_ds.distributed import ranks


def attention_of(config: Config) -> str:
    """`model.attention`, or for `auto` the fastest that this machine has and the model knows:
    flash_attention_2, else sdpa, else eager. The choice is said once, by the first rank.
    """
    model = config.model
    if model.attention != "auto":
        return model.attention
    return _chosen(model.path, model.dtype, model.trust_remote_code)


@functools.cache
def _chosen(path: str, dtype: str, trust_remote_code: bool) -> str:
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    kind = type(config)
    known = kind in AutoModelForCausalLM._model_mapping
    cls = AutoModelForCausalLM._model_mapping[kind] if known else None
    flash_fits = getattr(cls, "_supports_flash_attn", False) and not getattr(
        cls, "_compatible_flash_implementations", None
    )
    installed = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    if flash_fits and installed and dtype != "float32":
        choice, reason = "flash_attention_2", "installed, and the model knows it"
    elif getattr(cls, "_supports_sdpa", False):
        reason = "flash_attention_2 needs flash-attn, a CUDA device and a half precision"
        choice, reason = "sdpa", reason if flash_fits else "the model knows no flash_attention_2"
    else:
        name = cls.__name__ if cls is not None else kind.__name__
        choice, reason = "eager", f"{name} names no faster one"
    if ranks.is_main():
        print(f"attention: {choice} ({reason}); model.attention sets another", flush=True)
    return choice
