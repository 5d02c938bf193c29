"""A model is loaded as its folder has it, or not at all: tensors that are missing, unexpected, of
another shape, or not finite are refused by name.

transformers fills what is missing with random numbers and leaves out what it does not expect, with
a warning; under ZeRO-3 (seen with 5.23) without one.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.distributed import ranks
from grads_ds.engine.model_check import check_model, read_head, weight_files
from grads_ds.run_dir.storage import raise_if_storage
from grads_ds.workarounds import without_sharded_loading

SHOWN = 5  # names in one problem; the rest are counted


def check_tensors(config: Config, path: str | Path) -> None:
    """Compare the tensors of the folder `path` with those of the model its config describes.

    Every rank calls this, rank 0 looks. Raises UserError on every rank. A hub id is left to
    `check_loaded`.
    """
    if Path(path).is_dir():
        ranks.from_main(lambda: _compare(config, Path(path)))


def check_loaded(model: nn.Module, info: dict[str, Any], path: str | Path) -> None:
    """What transformers says it did (`info`), and that every number of the model is finite.

    Every rank calls this and looks at the parameters, or the shards of them, that it holds. Raises
    UserError on every rank.
    """
    not_finite = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not torch.isfinite(held(tensor).detach()).all()
    ]
    unexpected = info.get("unexpected_keys", ())
    mismatched = [item[0] for item in info.get("mismatched_keys", ())]
    seen = ranks.all_gather_object((not_finite, mismatched))
    found = [
        _named(path, "every tensor of the model", "missing", info.get("missing_keys", ())),
        _named(path, "tensors of the model alone", "unexpected", unexpected),
        _named(path, "tensors of the model's shapes", "others", [n for s in seen for n in s[1]]),
        _named(path, "finite numbers", "NaN or infinity", [n for s in seen for n in s[0]]),
    ]
    if any(found):
        raise UserError([text for text in found if text])


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it, or under ZeRO-3 its shard [n] without the
    padding by which shards are made equal, whose memory was never written.
    """
    shard = getattr(tensor, "ds_tensor", None)
    if shard is None:
        return tensor
    parameter: Any = tensor
    before = shard.numel() * int(parameter.ds_zero_partition_rank)
    return shard.reshape(-1)[: max(0, int(parameter.ds_numel) - before)]


def _compare(config: Config, folder: Path) -> None:
    problems = check_model(str(folder))
    if problems:
        raise UserError(problems)
    given, twice, kinds = _given(weight_files(folder)[1])
    model, quantized = _described(config, folder)
    if twice:  # readers differ on which counts
        raise UserError(str(_named(folder, "every tensor once", "in two files", twice)))
    if not quantized:
        _refuse_integers(folder, model, kinds)
    if _renamed_on_loading(model):
        return  # names in the files are not the model's: transformers' own report is looked at
    prefix = f"{model.base_model_prefix}."
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not any(name.startswith(prefix) for name in given):  # saved without the head's wrapper
        given = {
            prefix + name if prefix + name in expected else name: given[name] for name in given
        }
    tied = _tied(model)
    missing = [
        name
        for name in expected.keys() - given.keys()
        if not any(other in given for other in tied.get(name, ()))
        and not _ignored(name, model._keys_to_ignore_on_load_missing)
    ]
    unexpected = [
        name
        for name in given.keys() - expected.keys()
        if not _ignored(name, model._keys_to_ignore_on_load_unexpected)
        and not name.endswith("rotary_emb.inv_freq")  # a buffer that older files hold
    ]
    shapes = [
        f"{name} {list(given[name])} for {list(expected[name])}"
        for name in given.keys() & expected.keys()
        if given[name] != expected[name]
    ]
    found = [
        _named(folder, "every tensor of the model", "missing", missing),
        _named(folder, "tensors of the model alone", "unexpected", unexpected),
        _named(folder, "tensors of the model's shapes", "others", shapes),
    ]
    if any(found):
        raise UserError([text for text in found if text])


def _described(config: Config, folder: Path) -> tuple[Any, bool]:
    """The model that config.json describes, without memory, and whether its weights are packed
    numbers. Raises UserError where transformers can build none of it.
    """
    remote = config.model.trust_remote_code
    fix = "restore the file"
    try:
        with without_sharded_loading(), torch.device("meta"):
            shape = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
            model = AutoModelForCausalLM.from_config(shape, trust_remote_code=remote)
        packing = getattr(shape, "quantization_config", None)
        if packing is not None:
            fix = "install what it asks for, or give the model in floating point"
            _look_at_quantizer(packing, getattr(torch, config.model.dtype))
    except Exception as error:  # libraries and a model's own code raise anything
        raise_if_storage(error)
        reason = " ".join(str(error).split())[:300]
        found = f"{folder}/config.json, of which it builds none ({type(error).__name__}: {reason})"
        raise UserError(
            problem("model.path", "a model that transformers builds", found, fix)
        ) from error
    return model, packing is not None


def _look_at_quantizer(packing: Any, dtype: torch.dtype) -> None:
    """Raise what transformers has against weights of this `quantization_config`: a method it does
    not know, whose weights it would take for plain ones, a package or a device that is not here.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(packing, pre_quantized=True)
    quantizer.validate_environment(device_map=None, weights_only=True, dtype=dtype)


def _given(files: list[Path]) -> tuple[dict[str, tuple[int, ...]], list[str], dict[str, str]]:
    """(shape of each tensor, names that stand in two files, dtype of each tensor in words)."""
    shapes: dict[str, tuple[int, ...]] = {}
    twice: list[str] = []
    kinds: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            tensors = read_head(file)
            found = {name: tuple(value["shape"]) for name, value in tensors.items()}
            kinds |= {name: str(value["dtype"]) for name, value in tensors.items()}
        else:
            loaded = _pickled(file)
            found = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
            kinds |= {name: str(tensor.dtype) for name, tensor in loaded.items()}
        twice += found.keys() & shapes.keys()
        shapes |= found
    return shapes, twice, kinds


def _pickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin`, without memory where it is a zip file (torch from 1.6 on writes it).

    Raises UserError for anything but tensors by name.
    """
    try:
        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="meta", mmap=mapped, weights_only=True)
        return {name: tensor for name, tensor in loaded.items() if tensor.shape is not None}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise_if_storage(error)
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            problem("model.path", f"tensors by name in {file}", reason, "copy it anew")
        ) from error


def _refuse_integers(folder: Path, model: Any, kinds: dict[str, str]) -> None:
    """Raise UserError for integers and complex numbers in the place of a weight: transformers casts
    them to floating point without a word.
    """
    weights = {name for name, value in model.named_parameters() if value.is_floating_point()}
    wrong = re.compile(r"(torch\.)?(BOOL|[UI]\d+|C\d+|bool|u?int\d+|complex\d+)")
    found = [
        f"{name} ({kind})"
        for name, kind in kinds.items()
        if wrong.fullmatch(kind) and {name, f"{model.base_model_prefix}.{name}"} & weights
    ]
    if found:
        wanted = "weights in floating point, as its config.json has no quantization_config"
        raise UserError(str(_named(folder, wanted, "others", found)))


def _tied(model: Any) -> dict[str, set[str]]:
    """For each name of a tied weight, its other names."""
    names: dict[int, set[str]] = {}
    model.tie_weights()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), set()).add(name)
    return {name: group - {name} for group in names.values() for name in group if len(group) > 1}


def _renamed_on_loading(model: Any) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _ignored(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _named(path: str | Path, wanted: str, kind: str, names: Iterable[str]) -> str | None:
    names = sorted(set(names))
    if not names:
        return None
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    found = f"{kind}: {', '.join(names[:SHOWN])}{more}"
    return problem(f"model {path}", wanted, found, "give the folder as it was saved")
