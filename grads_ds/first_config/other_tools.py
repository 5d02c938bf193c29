"""A configuration of Axolotl, LLaMA-Factory or TRL -> its model, its data and the values that mean
the same here.

Reads the YAML (or JSON) file; `other_tools_data.py` finds its data. Writes nothing. Keys that have
no like here are returned by name, so that they are said once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grads_ds.config.errors import UserError, problem
from grads_ds.config.trainer_options import BITSANDBYTES, PLAIN_OPTIMIZERS
from grads_ds.config.training import SftConfig
from grads_ds.first_config.other_tools_data import place_of, sources_of
from grads_ds.first_config.setting import Setting

# their key -> ours, where the value means the same
_AXOLOTL = {
    "sequence_len": "data.max_length",
    "num_epochs": "sft.epochs",
    "micro_batch_size": "sft.micro_batch_size",
    "sample_packing": "sft.packing",
    "optimizer": "sft.trainer.optim",
    "peft_use_dora": "model.lora.dora",
    "peft_use_rslora": "model.lora.rslora",
    "lora_r": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "lora_modules_to_save": "model.lora.modules_to_save",
}
_LLAMA_FACTORY = {
    "cutoff_len": "data.max_length",
    "num_train_epochs": "sft.epochs",
    "per_device_train_batch_size": "sft.micro_batch_size",
    "lr_scheduler_type": "sft.lr_scheduler",
    "enable_liger_kernel": "sft.trainer.use_liger_kernel",
    "lora_rank": "model.lora.r",
    "quantization_bit": "model.lora.load_in_4bit",
    "lora_target": "model.lora.target_modules",
    "additional_target": "model.lora.modules_to_save",
}
_TRL = {
    "max_length": "data.max_length",
    "num_train_epochs": "sft.epochs",
    "per_device_train_batch_size": "sft.micro_batch_size",
    "lr_scheduler_type": "sft.lr_scheduler",
    "lora_r": "model.lora.r",
    "lora_target_modules": "model.lora.target_modules",
    "lora_modules_to_save": "model.lora.modules_to_save",
}
_ALL = {
    "learning_rate": "sft.learning_rate",
    "lr_scheduler": "sft.lr_scheduler",
    "warmup_ratio": "sft.warmup_ratio",
    "weight_decay": "sft.weight_decay",
    "max_grad_norm": "sft.max_grad_norm",
    "gradient_checkpointing": "sft.gradient_checkpointing",
    "packing": "sft.packing",
    "optim": "sft.trainer.optim",
    "neftune_noise_alpha": "sft.trainer.neftune_noise_alpha",
    "use_liger_kernel": "sft.trainer.use_liger_kernel",
    "seed": "seed",
    "trust_remote_code": "model.trust_remote_code",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "use_dora": "model.lora.dora",
    "use_rslora": "model.lora.rslora",
    "load_in_4bit": "model.lora.load_in_4bit",
}
# their switches, with the values that are what is done here
_SAID: dict[str, tuple[Any, ...]] = {
    "adapter": ("lora", "qlora"),
    "finetuning_type": ("lora", "full"),
    "use_peft": (True, False),
    "stage": ("sft",),
    "do_train": (True,),
}
_SCHEDULES = SftConfig.model_json_schema()["properties"]["lr_scheduler"]["enum"]


@dataclass(frozen=True)
class Borrowed:
    """What another tool's configuration says. `accumulation`: its micro-batches per step; `left`:
    its keys that are not taken over.
    """

    tool: str
    model: str
    data: list[str]
    settings: list[Setting]
    accumulation: int
    left: list[str]


def read_other(file: str) -> Borrowed:
    """Read `file`. Raises UserError with every problem."""
    path = Path(file)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(problem("--from", "a YAML file", reason, "give another")) from None
    given = given if isinstance(given, dict) else {}
    tool, names = _tool(given)
    if not tool:
        wanted = "a configuration of Axolotl (base_model), LLaMA-Factory (dataset) or TRL"
        found = f"the keys {', '.join(map(str, list(given)[:8])) or 'none'}"
        raise UserError(problem(f"--from {file}", wanted, found, "write one by grads-ds init DATA"))
    problems: list[str] = []
    data, read, left = sources_of(tool, given, path, problems)
    model_key = "base_model" if tool == "Axolotl" else "model_name_or_path"
    if not isinstance(given[model_key], str):
        found = f"{given[model_key]!r}"
        problems.append(problem(f"{path}: {model_key}", "a folder or hub id", found, "name one"))
    if problems:
        raise UserError(problems)
    lora = _adapts(tool, given)
    settings: list[Setting] = []
    inner: dict[str, dict[str, Any]] = {"model.lora": {}, "sft.trainer": {}}
    read.add(model_key)
    for key, ours in (_ALL | names).items():
        value = _value(ours, given.get(key))
        section, _, last = ours.rpartition(".")
        if value is None or (section == "model.lora" and not lora):
            continue
        read.add(key)
        if section in inner:
            inner[section][last] = value
        else:
            settings.append(Setting(ours, value, f"{path.name}: {key}"))
    if lora:
        settings.append(Setting("model.lora", inner["model.lora"], f"{path.name}: its adapter"))
    if inner["sft.trainer"]:
        settings.append(Setting("sft.trainer", inner["sft.trainer"], f"{path.name}: its trainer"))
    read |= {key for key, values in _SAID.items() if given.get(key) in values}
    accumulation = _value("", given.get("gradient_accumulation_steps"))
    if isinstance(accumulation, int):
        read.add("gradient_accumulation_steps")
    left += [str(key) for key, value in given.items() if key not in read and value is not None]
    return Borrowed(
        tool,
        place_of(str(given[model_key]), path),
        data,
        settings,
        accumulation if isinstance(accumulation, int) else 1,
        sorted(left),
    )


def _tool(given: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    if "base_model" in given:
        return "Axolotl", _AXOLOTL
    if "model_name_or_path" in given and isinstance(given.get("dataset"), str):
        return "LLaMA-Factory", _LLAMA_FACTORY
    if "model_name_or_path" in given and ("dataset_name" in given or "datasets" in given):
        return "TRL", _TRL
    return "", {}


def _adapts(tool: str, given: Mapping[str, Any]) -> bool:
    if tool == "Axolotl":
        return given.get("adapter") in ("lora", "qlora")
    if tool == "LLaMA-Factory":
        return given.get("finetuning_type", "lora") == "lora"
    return bool(given.get("use_peft"))


def _value(ours: str, value: Any) -> Any:
    """The value as it is written here; None where there is no like."""
    if ours == "sft.lr_scheduler":
        return value if value in _SCHEDULES else None
    if ours == "sft.trainer.optim":
        return value if value in (*PLAIN_OPTIMIZERS, *BITSANDBYTES) else None
    if ours == "model.lora.load_in_4bit":  # a number of bits, or whether
        return {4: True, True: True, False: False}.get(value)
    if ours == "sft.gradient_checkpointing":
        return bool(value) if value is not None else None
    if ours in ("model.lora.target_modules", "model.lora.modules_to_save"):
        names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        return "all-linear" if names in (["all"], ["all-linear"]) else names
    if value == "auto":  # theirs to choose
        return None
    for kind in (int, float) if isinstance(value, str) else ():  # 2e-4 is text to YAML
        with contextlib.suppress(ValueError):
            return kind(value)
    return value
