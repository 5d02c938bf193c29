"""Which group of parameters each parameter belongs to: embedding, lm_head, attention, mlp, norm,
lora, or other.

Every parameter belongs to exactly one group, so that groups add up to the whole model. `other`
holds what has no name of its own (learned positions, for example); it is recorded with `all` only.
"""

from __future__ import annotations

import re

import torch
from torch import nn

GROUPS = ("embedding", "lm_head", "attention", "mlp", "norm", "lora")
OTHER = "other"

_LORA = re.compile(r"(^|\.)(lora_|vera_|dora_)")
_NORM = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|expert|moe|router|feed_?forward|ffn?($|[._])|(^|\.)fc\d|gate_proj|up_proj|down_proj",
    re.IGNORECASE,
)
_ATTENTION = re.compile(
    r"attn|attention|(^|\.)([qkvo]|qkv|out)_?proj|query_key_value|mixer", re.IGNORECASE
)


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape, also where ZeRO-3 has taken it apart (DeepSpeed keeps the whole shape
    in `ds_shape`).
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def parse_layers(layers: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """`layers` as given by the user -> names of groups; "all" gives every group and `other`, ()
    none (losses only). Raises ValueError.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if "all" in names:
        return (*GROUPS, OTHER)
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise ValueError(f"layers must be 'all' or any of {', '.join(GROUPS)}; found {unknown}")
    return names


def group_of(name: str, module: nn.Module, is_embedding: bool, is_head: bool) -> str:
    """The group of the parameter called `name`, owned by `module`. A tied table is both embedding
    and lm_head: the caller says so with both flags and the answer is "embedding".
    """
    if _LORA.search(name):
        return "lora"
    if is_embedding:
        return "embedding"
    if is_head:
        return "lm_head"
    path = name.rsplit(".", 1)[0]
    leaf = path.rsplit(".", 1)[-1]
    if _NORM.search(type(module).__name__) or _NORM.search(leaf):
        return "norm"
    if _MLP.search(path) and not _ATTENTION.search(path.rsplit(".", 1)[-1]):
        return "mlp"
    if _ATTENTION.search(path):
        return "attention"
    if _MLP.search(path):
        return "mlp"
    return OTHER
