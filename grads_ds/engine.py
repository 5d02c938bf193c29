"""Models on DeepSpeed engines: the settings, loading a checkpoint sharded, gathering parameters,
writing a model folder.

Reads a Hugging Face folder or hub id and the user's DeepSpeed JSON; writes Hugging Face safetensors
folders.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.integrations import HfDeepSpeedConfig

from grads_ds import ranks
from grads_ds.config import Config
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.engine_memory import close
from grads_ds.run_dir import atomic_path

# one safetensors file holds about this much; also the writer's peak host memory
SHARD_BYTES = 4 * 2**30


def device() -> torch.device:
    """Where this rank computes."""
    accelerator = deepspeed.accelerator.get_accelerator()
    name = accelerator.current_device_name()
    return torch.device("cpu" if name.startswith("cpu") else name)


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


def load_model(config: Config, path: str | Path) -> nn.Module:
    """The causal language model at `path` in the configured dtype.

    Sharded as it loads while an HfDeepSpeedConfig is alive.
    """
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )


@contextlib.contextmanager
def frozen_model(config: Config, path: str | Path) -> Iterator[tuple[nn.Module, Any]]:
    """The model at `path` on an engine without optimizer or gradients. Yields (module, engine).

    Under ZeRO-3 each rank holds its share of the parameters only. Call the module, not the engine,
    whose output hook refuses a backward that the engine did not start.
    """
    settings = scoring_settings(config)
    holder = HfDeepSpeedConfig(settings)  # transformers looks at it while it lives, to load sharded
    model = load_model(config, path)
    model.requires_grad_(False)
    model.eval()
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    try:
        yield engine.module, engine
    finally:
        close(engine)
        del holder


def gather(parameters: Sequence[torch.Tensor]) -> AbstractContextManager[Any]:
    """Whole parameters for the length of a `with`, whatever the ZeRO stage."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(parameters) if parameters else contextlib.nullcontext()


def save_model(model: nn.Module, config: Config, folder: Path, card: str | None = None) -> None:
    """Write a Hugging Face folder: safetensors shards, config, generation config, the tokenizer and
    template prepare used.

    Every rank takes part; rank 0 writes. Parameters are gathered one by one and written shard by
    shard, so that rank 0's memory stays near one shard. Tied weights are written once. `card`
    becomes README.md. `folder` appears when it is complete.
    """
    from safetensors.torch import save_file

    main = ranks.is_main()
    publish: AbstractContextManager[Path] = (
        atomic_path(folder) if main else contextlib.nullcontext(folder)
    )
    with publish as aside:
        shard: dict[str, torch.Tensor] = {}
        index: dict[str, str] = {}
        files: list[Path] = []
        written = 0

        def flush() -> None:
            nonlocal shard
            if shard:
                files.append(aside / f"model-{len(files) + 1:05d}.safetensors")
                save_file(shard, files[-1], metadata={"format": "pt"})
                index.update(dict.fromkeys(shard, files[-1].name))
                shard = {}

        if main:
            aside.mkdir()
        seen: set[int] = set()
        for name, needed, make in _saved_tensors(model):
            if id(needed[0]) in seen:  # the second name of a tied weight
                continue
            seen.add(id(needed[0]))
            with gather(needed):
                if not main:
                    continue
                tensor = make().detach().cpu().contiguous().clone()
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
                flush()
            shard[name] = tensor
            written += tensor.nbytes
        if main:
            flush()
            _write_index(aside, files, index, written)
            (
                model.get_base_model() if hasattr(model, "get_base_model") else model
            ).config.save_pretrained(aside)
            _save_companions(config, aside)
            if card is not None:
                (aside / "README.md").write_text(card)


def save_adapter(model: Any, config: Config, folder: Path) -> None:
    """Write the LoRA adapter alone as PEFT reads it, for tools that put it on the base model
    themselves. Every rank takes part.

    Adapters are small: they are gathered together. `folder` appears when it is complete.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    names, tensors = zip(
        *((n, p) for n, p in model.named_parameters() if ".lora_" in n), strict=True
    )
    with gather(tensors):
        if not ranks.is_main():
            return
        whole = {
            n: p.detach().cpu().contiguous().clone() for n, p in zip(names, tensors, strict=True)
        }
    with atomic_path(folder) as aside:
        aside.mkdir()
        save_file(
            get_peft_model_state_dict(model, state_dict=whole),
            aside / "adapter_model.safetensors",
            {"format": "pt"},
        )
        model.peft_config[model.active_adapter].save_pretrained(aside)
        load_tokenizer(config.model).save_pretrained(aside)


def _saved_tensors(
    model: nn.Module,
) -> Iterator[tuple[str, list[torch.Tensor], Callable[[], torch.Tensor]]]:
    """(name, tensors it is made from, how) for everything a model folder holds; adapters are folded
    into their layers.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted = {name: module for name, module in plain.named_modules() if hasattr(module, "lora_A")}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        owner = next((prefix for prefix in adapted if name.startswith(prefix + ".")), None)
        if owner is None:
            yield name, [parameter], partial(_itself, parameter)
        elif ".base_layer." in name:
            layer = adapted[owner]
            if name.endswith(".weight"):
                needed = [
                    parameter,
                    *(p for n, p in layer.named_parameters() if ".lora_" in f".{n}"),
                ]
                yield (
                    name.replace(".base_layer.", "."),
                    needed,
                    partial(_with_adapter, parameter, layer),
                )
            else:
                yield name.replace(".base_layer.", "."), [parameter], partial(_itself, parameter)
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in plain.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, buffer in plain.named_buffers(remove_duplicate=False):
        if name not in unsaved:
            yield name, [buffer], partial(_itself, buffer)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _with_adapter(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    # summed in float32 at least: adapters are small beside the weights they change
    return (weight.float() + layer.get_delta_weight(layer.active_adapters[0]).float()).to(
        weight.dtype
    )


def _write_index(folder: Path, files: list[Path], index: dict[str, str], written: int) -> None:
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    total = len(files)
    names = {
        file.name: f"model-{number:05d}-of-{total:05d}.safetensors"
        for number, file in enumerate(files, 1)
    }
    for file in files:
        file.rename(folder / names[file.name])
    weight_map = {name: names[file] for name, file in index.items()}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": written}, "weight_map": weight_map}, indent=1)
    )


def _save_companions(config: Config, folder: Path) -> None:
    load_tokenizer(config.model).save_pretrained(folder)
    with contextlib.suppress(OSError):  # many models have no generation config
        GenerationConfig.from_pretrained(config.model.path).save_pretrained(folder)
    source = Path(config.model.path, "tokenizer.model")
    if source.is_file():
        shutil.copy2(source, folder / source.name)
