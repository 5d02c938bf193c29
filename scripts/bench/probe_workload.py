"""The random model, its configuration, its training and the batches of bench_probe.py and
bench_hosts.py.
"""

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


def started(folder: Path, samples: int) -> tuple[Any, Any]:
    """The configuration in `folder`, and an engine that trains its model with `samples` samples in
    a micro-batch, on this job's ranks, which it starts.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from grads_ds.config.load import load_config
    from grads_ds.distributed import ranks
    from grads_ds.engine.model import load_model
    from grads_ds.engine.settings import scoring_settings

    ranks.start()
    config = load_config(folder / "config.yaml")
    settings = scoring_settings(config) | {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "train_micro_batch_size_per_gpu": samples,
    }
    holder = HfDeepSpeedConfig(settings)
    trained = load_model(config, config.model.path).train()
    trainer, *_ = deepspeed.initialize(
        model=trained, config=settings, model_parameters=list(trained.parameters())
    )
    del holder
    return config, trainer
