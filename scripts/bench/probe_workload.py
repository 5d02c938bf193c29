"""The random model, its configuration and the batches of scripts/bench/bench_probe.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def make(folder: Path, layers: int, vocabulary: int, width: int, shards: int) -> int:
    """A random model in `folder`/model, in about `shards` files, and its configuration; the number
    of parameters.
    """
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=8 * width // 3 // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=width // 64 or 1,
            num_key_value_heads=width // 64 or 1,
            max_position_embeddings=512,
        )
    )
    count = model.num_parameters()
    model.save_pretrained(folder / "model", max_shard_size=4 * count // shards)
    zero = {
        "stage": 3,
        "stage3_max_live_parameters": count // 20,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    config = {
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "zero3.json"),
        "data": {"train": ["none"]},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return count


def batch_of(samples: int, length: int, vocabulary: int) -> dict[str, Any]:
    """Random tokens of which the second half are targets."""
    import torch

    from grads_ds.distributed import ranks

    draw = torch.Generator().manual_seed(ranks.rank())
    ids = torch.randint(0, vocabulary, (samples, length), generator=draw)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
