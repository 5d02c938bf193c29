"""How samples, ranks and attention heads divide, and whether the DeepSpeed file agrees.

No torch import: asked before any work starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.errors import WRONG_PATH, UserError
from grads_ds.config.training import SftConfig, TrainingConfig


def check_training(config: Config, section: str, settings: TrainingConfig, ranks: int) -> list[str]:
    """Problems of a training section: a batch the ranks cannot share, or a DeepSpeed file that says
    something else.
    """
    problems = []
    size = settings.batch_size
    sequence = settings.sequence_parallel if isinstance(settings, SftConfig) else 1
    if problem := undivided_ranks(ranks, sequence):
        return [f"{section}.sequence_parallel: {problem}"]
    if sequence > 1:
        problems += _heads_problems(Path(config.model.path), section, sequence)
    ranks //= sequence  # groups of ranks, which read rows of their own
    if size % ranks:
        low = max(ranks, size - size % ranks)
        who = "ranks" if sequence == 1 else f"groups of {sequence} ranks"
        problems.append(
            f"{section}.batch_size: {size} samples per step cannot be shared equally by {ranks}"
            f" {who}; try {low}{f' or {low + ranks}' if low < size else ''}"
        )
        return problems
    try:
        user = config.deepspeed_json()
    except UserError as error:
        return error.problems
    micro = micro_batch(settings, ranks)
    zero = user.get("zero_optimization", {})
    if sequence > 1 and (zero.get("stage") != 3 or not zero.get("reduce_scatter", True)):
        problems.append(
            f"{config.deepspeed}: wanted zero_optimization with stage 3 and reduce_scatter for"
            f" {section}.sequence_parallel, elsewhere DeepSpeed scales gradients otherwise and they"
            " would be clipped at another norm; change it"
        )
    for key in ("sequence_parallel_size", "data_parallel_size"):
        if key in user:
            problems.append(
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
            problems.append(
                f"{config.deepspeed}: {key} is {found}, while {section} asks for {value}; set it to"
                ' "auto"'
            )
    for key, dtype in half.items():
        found = user.get(key, {}).get("enabled", "auto")
        if found not in ("auto", config.model.dtype == dtype):
            problems.append(
                f"{config.deepspeed}: {key}.enabled is {found}, while model.dtype is"
                f' {config.model.dtype}; set it to "auto"'
            )
    return problems


def _heads_problems(model: Path, section: str, sequence: int) -> list[str]:
    """Problems of a model folder whose heads a group of `sequence` ranks cannot share.

    Other folders are check_model's, a hub id is left alone.
    """
    try:
        shape = json.loads((model / "config.json").read_text())
    except (*WRONG_PATH, ValueError):
        return []
    problem = unshared_heads(shape, sequence)
    return [f"{section}.sequence_parallel: {model}/config.json: {problem}"] if problem else []


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
