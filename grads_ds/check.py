"""Faults that can be found before any work starts: missing files, a model without weights, settings
that cannot fit.

Reads the config and looks at the files it names; writes nothing. No torch import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from grads_ds.config import Config, SftConfig, TrainingConfig, UserError
from grads_ds.task_files import task_faults

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def check_inputs(config: Config, stages: Collection[str], ranks: int) -> None:
    """Look at what the named stages are about to read. Raises UserError with every fault found.

    `stages` are those that are due and their units that are ("probe", "probe/train"), `ranks` is
    how many the distributed ones will have.
    """
    faults: list[str] = []
    run_dir = Path(config.run_dir)
    if "prepare" in stages:
        from grads_ds.prepare import check_prepare

        faults += check_prepare(config)
    if {"probe", "sft", "evaluate"} & set(stages):
        faults += check_model(config.model.path)
    if "probe/train" in stages:  # a recording goes on with any number of ranks
        faults += check_training(config, "probe", config.probe, ranks)
    if "select" in stages:
        from grads_ds.selection.needs import check_select

        faults += check_select(config, run_dir)
        if "prepare" not in stages:
            faults += check_budgets(config, run_dir)
    if "sft" in stages:
        faults += check_training(config, "sft", config.sft, ranks)
    if "evaluate" in stages:
        faults += task_faults(config.evaluate)
    if faults:
        raise UserError(list(dict.fromkeys(faults)))


def check_budgets(config: Config, run_dir: Path) -> list[str]:
    """Faults of budgets given as a count that the prepared pool does not hold."""
    pool = json.loads((run_dir / "prepared/prepared.json").read_text())["sets"]["pool"]["kept"]
    faults = []
    for name in (None, *config.select.variants):
        budget = config.select.resolve(name).budget
        if isinstance(budget, float) and budget > max(1, pool):
            where = f"select.variants.{name}.budget" if name else "select.budget"
            faults.append(
                f"{where}: wanted at most the pool's {pool} samples; found {budget:g}; lower it or"
                " add data"
            )
    return faults


def check_model(path: str) -> list[str]:
    """Faults of a model folder: absent, no or broken config.json, no weights.

    A hub id is left to the hub's client.
    """
    folder = Path(path)
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return []  # owner/name
        return [
            f"model.path: wanted a Hugging Face folder or hub id; found nothing at {path}; give an"
            " existing folder"
        ]
    faults = []
    if not folder.is_dir():
        return [f"model.path: wanted a folder; {path} is a file; give the folder it lies in"]
    try:
        json.loads((folder / "config.json").read_text())
    except OSError:
        faults.append(
            f"model.path: wanted {path}/config.json; found none; give a Hugging Face model folder"
        )
    except ValueError as error:
        faults.append(
            f"model.path: {path}/config.json is not valid JSON ({error}); restore the file"
        )
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        faults.append(
            f"model.path: wanted weights (*.safetensors or *.bin) in {path}; found none; copy them"
            " there"
        )
    return faults


def check_training(config: Config, section: str, settings: TrainingConfig, ranks: int) -> list[str]:
    """Faults of a training section: a batch the ranks cannot share, or a DeepSpeed file that says
    something else.
    """
    faults = []
    size = settings.batch_size
    sequence = settings.sequence_parallel if isinstance(settings, SftConfig) else 1
    if fault := undivided_ranks(ranks, sequence):
        return [f"{section}.sequence_parallel: {fault}"]
    if sequence > 1:
        faults += _heads_faults(Path(config.model.path), section, sequence)
    ranks //= sequence  # groups of ranks, which read rows of their own
    if size % ranks:
        low = max(ranks, size - size % ranks)
        who = "ranks" if sequence == 1 else f"groups of {sequence} ranks"
        faults.append(
            f"{section}.batch_size: {size} samples per step cannot be shared equally by {ranks}"
            f" {who}; try {low}{f' or {low + ranks}' if low < size else ''}"
        )
        return faults
    try:
        user = config.deepspeed_json()
    except UserError as error:
        return error.faults
    micro = micro_batch(settings, ranks)
    zero = user.get("zero_optimization", {})
    if sequence > 1 and (zero.get("stage") != 3 or not zero.get("reduce_scatter", True)):
        faults.append(
            f"{config.deepspeed}: wanted zero_optimization with stage 3 and reduce_scatter for"
            f" {section}.sequence_parallel, elsewhere DeepSpeed scales gradients otherwise and they"
            " would be clipped at another norm; change it"
        )
    for key in ("sequence_parallel_size", "data_parallel_size"):
        if key in user:
            faults.append(
                f"{config.deepspeed}: wanted no {key}; found {user[key]}; set sft.sequence_parallel"
                " instead"
            )
    half = {"bf16": "bfloat16", "fp16": "float16"}
    wanted = {
        "train_batch_size": size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": size // ranks // micro,
        "gradient_clipping": settings.max_grad_norm,
    }
    for key, value in wanted.items():
        found = user.get(key, "auto")
        if found not in ("auto", value):
            faults.append(
                f"{config.deepspeed}: {key} is {found}, while {section} asks for {value}; set it to"
                ' "auto"'
            )
    for key, dtype in half.items():
        found = user.get(key, {}).get("enabled", "auto")
        if found not in ("auto", config.model.dtype == dtype):
            faults.append(
                f"{config.deepspeed}: {key}.enabled is {found}, while model.dtype is"
                f' {config.model.dtype}; set it to "auto"'
            )
    return faults


def _heads_faults(model: Path, section: str, sequence: int) -> list[str]:
    """Faults of a model folder whose heads a group of `sequence` ranks cannot share.

    Other folders are check_model's, a hub id is left alone.
    """
    try:
        shape = json.loads((model / "config.json").read_text())
    except (OSError, ValueError):
        return []
    fault = unshared_heads(shape, sequence)
    return [f"{section}.sequence_parallel: {model}/config.json: {fault}"] if fault else []


def undivided_ranks(ranks: int, sequence: int) -> str | None:
    """Why `ranks` cannot be put into groups of `sequence`, or None."""
    return (
        f"wanted a divisor of the {ranks} ranks; found {sequence}; change it"
        if ranks % sequence
        else None
    )


def unshared_heads(shape: Mapping[str, Any], sequence: int) -> str | None:
    """Why a group of `sequence` ranks cannot share the attention heads of a model's config, or
    None: Ulysses deals them out whole, and repeats key-value heads where there are fewer of them
    than ranks.
    """
    heads = shape.get("num_attention_heads", sequence)
    pairs = shape.get("num_key_value_heads") or heads
    if heads % sequence:
        return f"wanted a divisor of its {heads} attention heads; found {sequence}; change it"
    if pairs % sequence and sequence % pairs:
        return (
            f"wanted a divisor or a multiple of its {pairs} key-value heads; found {sequence};"
            " change it"
        )
    return None


def micro_batch(settings: TrainingConfig, ranks: int) -> int:
    """Samples per rank and forward pass: the largest divisor of a rank's share that
    micro_batch_size allows.
    """
    share = settings.batch_size // ranks
    fits: Callable[[int], bool] = lambda size: share % size == 0  # noqa: E731
    return max(filter(fits, range(1, min(settings.micro_batch_size, share) + 1)))
