"""A configuration of Axolotl, LLaMA-Factory or TRL -> its model, its data and the values that mean
the same here.

Reads the YAML (or JSON) file and, for LLaMA-Factory, `dataset_info.json`; writes nothing. Keys that
have no like here are returned by name, so that they are said once. Paths are looked for where the
command is started, then beside the file, as the tools do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grads_ds.config.errors import UserError, problem
from grads_ds.config.trainer_options import BITSANDBYTES, PLAIN_OPTIMIZERS
from grads_ds.config.training import SftConfig
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
_SCHEDULES = SftConfig.model_json_schema()["properties"]["lr_scheduler"]["enum"]
_COLUMNS = frozenset(
    ("instruction", "input", "output", "messages", "conversations", "conversation", "system")
    + ("tools", "history", "prompt", "completion", "text")
)


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
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(problem("--from", "a YAML file", reason, "give another")) from None
    given = given if isinstance(given, dict) else {}
    tool, names = _tool(given)
    if not tool:
        wanted = "a configuration of Axolotl (base_model), LLaMA-Factory (dataset) or TRL"
        found = f"the keys {', '.join(map(str, list(given)[:8])) or 'none'}"
        raise UserError(problem(f"--from {file}", wanted, found, "write one by grads-ds init DATA"))
    problems: list[str] = []
    data, data_keys = _data(tool, given, path, problems)
    model_key = "base_model" if tool == "Axolotl" else "model_name_or_path"
    if problems:
        raise UserError(problems)
    lora = _adapts(tool, given)
    settings: list[Setting] = []
    inner: dict[str, dict[str, Any]] = {"model.lora": {}, "sft.trainer": {}}
    read = {*data_keys, model_key, "gradient_accumulation_steps"}
    for key, ours in (_ALL | names).items():
        value = _value(ours, given.get(key))
        if value is None:
            continue
        read.add(key)
        section, _, last = ours.rpartition(".")
        if section in inner:
            inner[section][last] = value
        else:
            settings.append(Setting(ours, value, f"{path.name}: {key}"))
    if lora:
        settings.append(Setting("model.lora", inner["model.lora"], f"{path.name}: its adapter"))
    if inner["sft.trainer"]:
        settings.append(Setting("sft.trainer", inner["sft.trainer"], f"{path.name}: its trainer"))
    read |= {"adapter", "finetuning_type", "use_peft", "stage", "do_train"}
    accumulation = given.get("gradient_accumulation_steps")
    left = sorted(str(key) for key, value in given.items() if key not in read and value is not None)
    return Borrowed(
        tool,
        _place(str(given[model_key]), path),
        data,
        settings,
        accumulation if isinstance(accumulation, int) else 1,
        left,
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
    if isinstance(value, str):  # 2e-4 is text to YAML
        try:
            return float(value)
        except ValueError:
            return value
    return value


# ---- data ----------------------------------------------------------------------------------------


def _data(
    tool: str, given: Mapping[str, Any], path: Path, problems: list[str]
) -> tuple[list[str], set[str]]:
    """(sources, the keys they were read from)."""
    if tool == "LLaMA-Factory":
        return _registered(given, path, problems), {"dataset", "dataset_dir"}
    entries = given.get("datasets") or [{"path": given.get("dataset_name")}]
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        files = entry.get("data_files") or entry.get("path")
        field = entry.get("field_messages", "messages")
        if not files or field not in _COLUMNS:
            wanted = "path, and messages under a name that grads-ds reads"
            problems.append(problem(f"{path}: datasets", wanted, f"{entry}", "rename the field"))
            continue
        found += [_place(str(file), path) for file in _list(files)]
    return found, {"datasets", "dataset_name"}


def _registered(given: Mapping[str, Any], path: Path, problems: list[str]) -> list[str]:
    """The files of LLaMA-Factory's `dataset_info.json` that `dataset` names."""
    folder = Path(_place(str(given.get("dataset_dir", "data")), path))
    try:
        known = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        fix = "set dataset_dir"
        problems.append(problem(f"{path}: dataset_dir", "dataset_info.json", str(error), fix))
        return []
    found = []
    for name in map(str.strip, given["dataset"].split(",")):
        entry = known.get(name, {})
        strange = set(map(str, (entry.get("columns") or {}).values())) - _COLUMNS
        place = entry.get("file_name") or entry.get("hf_hub_url")
        if not place or strange:
            wanted = "a file_name, and columns under names that grads-ds reads"
            shown = f"columns {', '.join(sorted(strange))}" if strange else "no such entry"
            problems.append(problem(f"{path}: dataset {name}", wanted, shown, "rename them"))
            continue
        found.append(str(folder / place) if entry.get("file_name") else place)
    return found


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _place(name: str, path: Path) -> str:
    """`name` where it is: here, else beside the file; as it stands where neither (a hub id)."""
    beside = path.parent / name
    return str(beside) if not Path(name).exists() and beside.exists() else name
