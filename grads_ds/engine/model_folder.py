"""A trained model -> a Hugging Face folder of safetensors, shard by shard."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from grads_ds.config.config import Config
from grads_ds.data.prepared import trained_ends
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.distributed import ranks
from grads_ds.engine.four_bit import stands_for, without_quantization
from grads_ds.engine.model import gathered_parameters
from grads_ds.run_dir.publish import atomic_path
from grads_ds.run_dir.storage import raise_if_storage

# one safetensors file holds about this much; also the writer's peak host memory
SHARD_BYTES = 4 * 2**30
_COPY, _ORIGINAL = ".modules_to_save.", ".original_module."  # PEFT's two of a module trained whole


def save_model(model: nn.Module, config: Config, folder: Path, card: str | None = None) -> None:
    """Write a Hugging Face folder: safetensors shards, config, generation config, the tokenizer and
    template prepare used.

    Every rank takes part; rank 0 writes. Parameters are gathered one by one and written shard by
    shard, so that rank 0's memory stays near one shard. Tied weights are written once; where an
    adapter changes one use of a tied weight alone, both are written and the config says that they
    are not tied. `card` becomes README.md. `folder` appears when it is complete.
    """
    from safetensors.torch import save_file

    tensors = list(_saved_tensors(model))
    shared = Counter(id(needed[0]) for needed in {_identity(t[1]): t[1] for t in tensors}.values())
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    # a module trained whole is a copy of its own, whatever the original was tied to
    copies = any(_COPY in name for name, _ in plain.named_parameters())
    untied = copies or any(uses > 1 for uses in shared.values())

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
        seen: set[tuple[int, ...]] = set()
        for name, needed, make in tensors:
            if _identity(needed) in seen:  # the second name of a tied weight
                continue
            seen.add(_identity(needed))
            with gathered_parameters(needed):
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
            shape = without_quantization(plain.config)
            (_untied(shape) if untied else shape).save_pretrained(aside)
            _save_companions(config, plain.config, aside)
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
        *((n, p) for n, p in model.named_parameters() if ".lora_" in n or _COPY in n), strict=True
    )
    with gathered_parameters(tensors):
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
        if _ORIGINAL in name:
            continue
        if _COPY in name:  # module.modules_to_save.default.weight is saved as module.weight
            before, _, after = name.partition(_COPY)
            yield f"{before}.{after.partition('.')[2]}", [parameter], partial(stands_for, parameter)
        elif owner is None:
            yield name, [parameter], partial(stands_for, parameter)
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
                yield name.replace(".base_layer.", "."), [parameter], partial(stands_for, parameter)
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in plain.named_modules()
        for name in module._non_persistent_buffers_set
    }
    for name, buffer in plain.named_buffers(remove_duplicate=False):
        if name not in unsaved:
            yield name, [buffer], partial(stands_for, buffer)


def _with_adapter(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    # summed in float32 at least: adapters are small beside the weights they change
    adapter = layer.active_adapters[0]
    delta = layer.get_delta_weight(adapter).float()
    plain = stands_for(weight)
    whole = plain.float() + delta
    if layer.use_dora.get(adapter):
        # DoRA: the direction of the sum, with a trained magnitude for each output, which of an
        # embedding are its columns
        magnitude = layer.lora_magnitude_vector[adapter].weight.float()
        dim = 0 if adapter in layer.lora_embedding_A else 1
        whole = whole * (magnitude / torch.linalg.norm(whole, dim=dim)).unsqueeze(dim)
    return whole.to(plain.dtype)


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


def _identity(needed: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(id, needed))


def _untied(shape: Any) -> Any:
    """The model's config with input and output embedding apart."""
    shape = copy.deepcopy(shape)
    for part in (shape, shape.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    return shape


def _save_companions(config: Config, shape: Any, folder: Path) -> None:
    """Tokenizer, generation config, and the code of a model that comes with its own."""
    load_tokenizer(config.model).save_pretrained(folder)
    _generation(config, shape).save_pretrained(folder)
    source = Path(config.model.path)
    if (source / "tokenizer.model").is_file():
        shutil.copy2(source / "tokenizer.model", folder)
    if config.model.trust_remote_code and source.is_dir():
        for file in sorted(source.rglob("*.py")):
            place = file.relative_to(source)
            if not any(part.startswith((".", "__pycache__")) for part in place.parts):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, folder / place)


def _generation(config: Config, shape: Any) -> GenerationConfig:
    """The base model's generation config, which stops at the ends that were trained too."""
    source = Path(config.model.path)
    if source.is_dir() and not (source / "generation_config.json").exists():
        generation = GenerationConfig.from_model_config(shape)
    else:
        try:
            generation = GenerationConfig.from_pretrained(config.model.path)
        except OSError as error:  # many models on the hub have none
            raise_if_storage(error)
            generation = GenerationConfig.from_model_config(shape)
    given = generation.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    trained = [end for end in trained_ends(Path(config.run_dir)) if end not in ends]
    if trained:
        ends += trained
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    return generation
