"""Between two models: theta0 + a (theta - theta0), tensor by tensor, shard by shard.

Reads the safetensors files of a base and of a model trained from it, tied or not, LoRA merged or
not; writes the shards of a folder. Memory stays near one shard: the files are mapped, and one shard
of the trained model is held at a time. Each value is computed in float32 (float64 of float64) and
rounded once to the trained model's dtype. An adapter by itself is scaled in its config, which is
exact. No engine is needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grads_ds.config.errors import UserError, problem
from grads_ds.engine.model_check import weight_files

# names that files use for one and the same tensor of a model with tied embeddings
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
ADAPTER = "adapter_config.json"
Beat = Callable[[str], Any]
Find = Callable[[str], tuple[Any, str] | None]  # name -> (open file, the name it has there)


def interpolate(base: Path, trained: Path, alpha: float, out: Path, beat: Beat) -> None:
    """Write base + alpha (trained - base) into the folder `out`, which exists and is empty.

    Everything beside the weights (config, tokenizer, generation config) is the trained model's.
    `beat` hears of every shard. Raises UserError where the two are not of one shape.
    """
    problems, files = weight_files(trained)
    other_problems, base_files = weight_files(base)
    if found := problems + other_problems + _not_safetensors([*files, *base_files]):
        raise UserError(found)
    with ExitStack() as stack:
        find = _finder(base_files, stack)
        _check_shapes(files, find, base, trained, stack)
        for number, file in enumerate(files, 1):
            beat(f"merging {file.name}, {number} of {len(files)}")
            _write_shard(file, find, alpha, out / file.name)
    names = {file.name for file in files}
    for file in sorted(trained.iterdir()):
        if file.is_file() and file.name not in names and file.name != "README.md":
            shutil.copy2(file, out)
        elif file.is_dir() and not file.name.startswith("."):
            shutil.copytree(file, out / file.name)


def blend(base: Tensor, trained: Tensor, alpha: float) -> Tensor:
    """base + alpha (trained - base), in float32 at least, in the dtype of `trained`. Values that
    are no floating-point numbers are the trained model's.
    """
    if not trained.is_floating_point():
        return trained
    wide = torch.promote_types(trained.dtype, torch.float32)
    start = base.to(wide)
    return (start + alpha * (trained.to(wide) - start)).to(trained.dtype)


def scale_adapter(adapter: Path, alpha: float, out: Path) -> None:
    """Write the LoRA adapter, its effect times alpha, into the folder `out`, which exists: base
    and adapter are then base + alpha (merged - base).

    Raises UserError for an adapter that is not linear in its scale.
    """
    file = adapter / ADAPTER
    if not file.is_file():
        raise UserError(
            problem("merge", f"an adapter in {adapter}", "none", "train with sft.adapter: true")
        )
    settings = json.loads(file.read_bytes())
    odd = [
        key
        for key in ("use_dora", "modules_to_save", "trainable_token_indices")
        if settings.get(key)
    ]
    if odd or settings.get("bias", "none") != "none":
        found = ", ".join([*odd, *(["bias"] if settings.get("bias", "none") != "none" else [])])
        wanted = f"a plain LoRA adapter in {adapter}, whose effect goes with its scale"
        raise UserError(
            problem("merge", wanted, found, "merge the whole model: leave --adapter out")
        )
    settings["lora_alpha"] *= alpha
    pattern = settings.get("alpha_pattern") or {}
    settings["alpha_pattern"] = {name: value * alpha for name, value in pattern.items()}
    for other in sorted(adapter.iterdir()):
        if other.is_file() and other.name not in (ADAPTER, "README.md"):
            shutil.copy2(other, out)
    (out / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n")


def _write_shard(file: Path, find: Find, alpha: float, target: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        shard: dict[str, Tensor] = {}
        for name in sorted(opened.keys()):
            place = find(name)
            assert place is not None
            shard[name] = blend(place[0].get_tensor(place[1]), opened.get_tensor(name), alpha)
        save_file(shard, target, metadata=opened.metadata() or {"format": "pt"})


def _finder(files: list[Path], stack: ExitStack) -> Find:
    """Finds a tensor of the base by the trained model's name for it: the same; with or without the
    prefix of the head's wrapper; or, where the base ties its embeddings, the other one's.
    """
    from safetensors import safe_open

    where: dict[str, Any] = {}
    for file in files:
        opened = stack.enter_context(safe_open(file, "pt"))
        where |= dict.fromkeys(opened.keys(), opened)
    prefixes = ("model.", "transformer.", "gpt_neox.")

    def find(name: str) -> tuple[Any, str] | None:
        names = [name, *(p + name for p in prefixes)]
        names += [name.removeprefix(p) for p in prefixes if name.startswith(p)]
        found = next((n for n in names if n in where), None)
        if found is None and (_HEADS.search(name) or _EMBEDDINGS.search(name)):
            kind = _EMBEDDINGS if _HEADS.search(name) else _HEADS
            tied = [n for n in where if kind.search(n)]
            found = tied[0] if len(tied) == 1 else None
        return (where[found], found) if found is not None else None

    return find


def _check_shapes(
    files: list[Path], find: Find, base: Path, trained: Path, stack: ExitStack
) -> None:
    """Raises UserError with every tensor of the trained model that the base lacks or has in another
    shape.
    """
    missing, shapes = [], []
    for name, shape in _shapes(files, stack):
        place = find(name)
        if place is None:
            missing.append(name)
        elif (theirs := place[0].get_slice(place[1]).get_shape()) != shape:
            shapes.append(f"{name} {shape} for {theirs}")
    wanted = f"the tensors of {trained} in {base}"
    found = [
        problem(
            "merge",
            wanted,
            f"{kind}: {', '.join(names[:5])} ({len(names)} in all)",
            "give the base that it was trained from",
        )
        for kind, names in (("missing", missing), ("other shapes", shapes))
        if names
    ]
    if found:
        raise UserError(found)


def _shapes(files: list[Path], stack: ExitStack) -> Iterator[tuple[str, list[int]]]:
    from safetensors import safe_open

    for file in files:
        opened = stack.enter_context(safe_open(file, "pt"))
        for name in sorted(opened.keys()):
            yield name, opened.get_slice(name).get_shape()


def _not_safetensors(files: list[Path]) -> list[str]:
    return [
        problem("merge", "weights as safetensors", str(file), "save the model as safetensors")
        for file in files
        if file.suffix != ".safetensors"
    ]
