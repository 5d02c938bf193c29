"""What a run needs on every host: files it reads, DeepSpeed extensions it compiles."""

from __future__ import annotations

from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.deepspeed_file import is_preset


def input_paths(config: Config) -> list[str]:
    """Files and folders that a run reads, absolute; hub ids are left to the hub's client, DeepSpeed
    presets come with the package.
    """
    held_out = [
        source for sources in config.data.validation_sources().values() for source in sources
    ]
    tasks = config.evaluate
    named = [
        config.model.path,
        *([] if is_preset(config.deepspeed) else [config.deepspeed]),
        config.model.chat_template,
        *tasks.multiple_choice.values(),
        *tasks.exact_match.values(),
        tasks.lm_eval.include_path if tasks.lm_eval else None,
        *config.data.train,
        *config.data.replay,
        *held_out,
        *config.anchor_sources(),
    ]
    there = [Path(name) for name in named if name is not None and Path(name).exists()]
    return list(dict.fromkeys(str(path.resolve()) for path in there))


def compiled_ops(config: Config) -> list[str]:
    """What DeepSpeed will compile or load for this config's offload."""
    zero = config.deepspeed_json().get("zero_optimization", {})
    optimizer, parameters = (
        zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")
    )
    return [
        *(["cpu_adam"] if optimizer != "none" else []),
        *(["async_io"] if "nvme" in (optimizer, parameters) else []),
    ]
