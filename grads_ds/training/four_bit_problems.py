"""Why a base in 4 bits (`model.lora.load_in_4bit`) cannot be trained on here.

No torch import: asked before any work starts.
"""

from __future__ import annotations

from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.training.trainer_problems import needs_gpu, needs_package

KEY = "model.lora.load_in_4bit"


def check_four_bit(config: Config) -> list[str]:
    """Problems of the key; none where it is not set."""
    if config.model.lora is None or not config.model.lora.load_in_4bit:
        return []
    found = needs_gpu(KEY, "true") + needs_package(KEY, "bitsandbytes", "grads-ds[bitsandbytes]")
    try:
        zero = config.deepspeed_json().get("zero_optimization", {})
    except UserError:  # check_training tells it
        return found
    if config.model.lora.dora and int(zero.get("stage", 0)) >= 3:
        wanted = f"zero_optimization.stage 0, 1 or 2 in {config.deepspeed} with model.lora.dora"
        fix = "set deepspeed to zero2, or dora to false"
        found.append(problem(KEY, wanted, "stage 3, where DeepSpeed's gathering fails", fix))
    setting = _not_for_four_bits(zero)
    if setting is not None:
        wanted = f"none of zero_optimization.{setting} in {config.deepspeed}"
        fix = "set deepspeed to zero2 or zero3, or remove one of the two"
        reason = "true; DeepSpeed copies, offloads or quantizes weights there as numbers of a dtype"
        found.append(problem(KEY, wanted, reason, fix))
    return found


def _not_for_four_bits(zero: dict[str, Any]) -> str | None:
    """The first setting that does more to weights than to shard them."""
    if zero.get("offload_param", {}).get("device", "none") != "none":
        return "offload_param"
    if int(zero.get("zero_hpz_partition_size", 1)) > 1:
        return "zero_hpz_partition_size"
    return "zero_quantized_weights" if zero.get("zero_quantized_weights") else None
