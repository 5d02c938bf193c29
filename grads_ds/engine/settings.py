"""The user's DeepSpeed settings, completed for training and for a pass without optimizer."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig

from grads_ds.config.config import Config


def training_settings(config: Config) -> dict[str, Any]:
    """The user's DeepSpeed settings for training; what they leave open becomes "auto", which the
    trainer fills in.
    """
    settings = copy.deepcopy(config.deepspeed_json())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        settings.setdefault(key, "auto")
    for key in ("bf16", "fp16"):
        settings.setdefault(key, {}).setdefault("enabled", "auto")
    return settings


def scoring_settings(config: Config) -> dict[str, Any]:
    """The user's DeepSpeed settings for a pass without optimizer: parameters sharded (ZeRO-3), or
    whole below stage 3.

    ZeRO-1 and 2 shard only what a frozen pass does not have, so they become stage 0. Batch sizes
    mean nothing here.
    """
    settings = copy.deepcopy(config.deepspeed_json())
    for key in (
        "optimizer",
        "scheduler",
        "gradient_clipping",
        "train_batch_size",
        "gradient_accumulation_steps",
    ):
        settings.pop(key, None)
    settings["train_micro_batch_size_per_gpu"] = 1
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        settings[key] = {**settings.get(key, {}), "enabled": config.model.dtype == dtype}
    zero = settings.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) != 3:
        settings["zero_optimization"] = {"stage": 0}
    else:
        hidden = AutoConfig.from_pretrained(
            config.model.path, trust_remote_code=config.model.trust_remote_code
        )
        size = getattr(hidden.get_text_config(), "hidden_size", 1024)
        for key, value in (
            ("reduce_bucket_size", size * size),
            ("stage3_prefetch_bucket_size", int(0.9 * size * size)),
            ("stage3_param_persistence_threshold", 10 * size),
        ):
            if zero.get(key, "auto") == "auto":
                zero[key] = value
    return _without_auto(settings)


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            kept[key] = _without_auto(value)
        elif value != "auto":
            kept[key] = value
    return kept
