"""Whose ranks share out a frozen model's parameters: all of the job's, or those of one host."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.distributed.host_group import ranks_by_host
from grads_ds.engine.device_memory import free_bytes
from grads_ds.engine.memory_shares import PARAMETERS
from grads_ds.workarounds import without_sharded_loading


def stays_in_host(config: Config, path: str | Path, settings: dict[str, Any]) -> bool:
    """Whether the model at `path` is to be sharded within each host, by `probe.shard_within` and
    the completed DeepSpeed `settings`. Every rank calls this and gets the same answer.

    Never below ZeRO-3, which alone shards a frozen model, nor on one host. `auto` leaves a model
    whose parameters are offloaded where it is.
    """
    zero, wanted = settings["zero_optimization"], config.probe.shard_within
    if wanted == "world" or zero["stage"] != 3 or len(ranks_by_host()) == 1:
        return False
    if wanted == "host":
        return True
    if zero.get("offload_param", {}).get("device", "none") != "none":
        return False
    model = config.model
    size = ranks.from_main(lambda: _bytes(str(path), model.dtype, model.trust_remote_code))
    fewest = min(len(host) for host in ranks_by_host())
    least = min(ranks.all_gather_object(free_bytes()))
    found = size / fewest <= PARAMETERS * least
    if ranks.is_main():
        print(
            f"shard_within: auto takes {'host' if found else 'world'}: {size / 2**30:.1f} GiB of"
            f" parameters over {fewest} ranks, {least / 2**30:.1f} GiB free on each",
            flush=True,
        )
    return found


@functools.cache
def _bytes(path: str, dtype: str, remote: bool) -> int:
    """Of the model's parameters in `dtype`; read from its config alone."""
    with without_sharded_loading(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path, trust_remote_code=remote), trust_remote_code=remote
        )
    return sum(p.numel() for p in model.parameters()) * int(getattr(torch, dtype).itemsize)
