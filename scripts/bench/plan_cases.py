"""The settings and sizes on which scripts/bench/plan_errors.py compares plan and measurement."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL_LIMITS = {
    "reduce_bucket_size": 2_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 4_000_000,
    "stage3_max_reuse_distance": 0,
}


@dataclass(frozen=True)
class Case:
    """`what`: sft or probe. `zero`: settings of zero_optimization.

    `config`: dotted settings of the configuration.
    """

    what: str
    ranks: int
    zero: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        """In words."""
        extra = [f"{key.split('.')[-1]} {value}" for key, value in self.config.items()] + (
            [self.note] if self.note else []
        )
        return ", ".join([self.what, f"stage {self.zero['stage']}", f"{self.ranks} ranks", *extra])


def stage(number: int, **limits: Any) -> dict[str, Any]:
    """Settings of ZeRO; stage 3's limits in proportion to so small a model, unless others are
    given.
    """
    defaults = SMALL_LIMITS if number == 3 else {"reduce_bucket_size": 2_000_000}
    return {"stage": number, "overlap_comm": False, **defaults, **limits}


CHECKPOINTED = {"sft.gradient_checkpointing": True}
RECOMPUTED = {"probe.gradient_checkpointing": True}
LORA = {"model.lora": {"r": 8}}
CASES = [
    *(
        Case("sft", ranks, stage(number), kept)
        for number in (2, 3)
        for ranks in (1, 2)
        for kept in ({}, CHECKPOINTED)
    ),
    *(Case("sft", ranks, stage(number), LORA) for number in (2, 3) for ranks in (1, 2)),
    Case("sft", 2, stage(3), LORA | CHECKPOINTED),
    Case("sft", 2, stage(3), {"model.dtype": "bfloat16"}),
    Case("sft", 2, stage(2), {"model.dtype": "bfloat16"}),
    Case(
        "sft",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000),
        note="reuse 40 % of the model, live 15 %",
    ),
    Case(
        "sft",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000, stage3_max_live_parameters=10**9),
        note="reuse 40 % of the model, live all",
    ),
    Case(
        "sft",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000, stage3_max_live_parameters=10**9),
        CHECKPOINTED,
        note="reuse 40 % of the model, live all",
    ),
    Case(
        "sft",
        2,
        stage(
            3,
            stage3_max_reuse_distance=10**9,
            stage3_max_live_parameters=10**9,
            stage3_prefetch_bucket_size=10**9,
        ),
        note="no limits",
    ),
    Case("sft", 2, stage(3), {"sft.sequence_parallel": 2}),
    Case("sft", 2, stage(3), {"sft.sequence_parallel": 2} | CHECKPOINTED),
    *(Case("probe", ranks, stage(number)) for number in (2, 3) for ranks in (1, 2)),
    *(
        Case("probe", ranks, stage(number), RECOMPUTED)
        for number, ranks in ((2, 1), (3, 1), (3, 2))
    ),
    Case("probe", 2, stage(3), RECOMPUTED | {"probe.recompute_layers": 3}),
    Case("probe", 2, stage(3), RECOMPUTED | {"probe.layers": "all"}),
    Case("probe", 2, stage(3), {"probe.layers": "all"}),
    Case("probe", 2, stage(3), {"model.dtype": "bfloat16"}),
    Case(
        "probe",
        2,
        stage(3, stage3_max_reuse_distance=10_000_000, stage3_max_live_parameters=10**9),
        note="reuse 40 %, live all",
    ),
    Case("probe", 2, stage(3), {"probe.extras": ["anchor"], "probe.anchor": "general"}),
    Case(
        "probe",
        1,
        stage(2),
        {"probe.extras": ["anchor"], "probe.anchor": "general", "probe.layers": "all"},
    ),
]


@dataclass(frozen=True)
class Size:
    """The model, and the rows."""

    layers: int = 6
    width: int = 512
    vocabulary: int = 6000
    length: int = 256
    micro: int = 2


def make(folder: Path, case: Case, size: Size) -> Path:
    """Write model, rows and configuration for `case` into `folder`; the configuration's path."""
    import torch
    import yaml
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    if case.what == "sft":
        (folder / "sft").touch()  # for the ranks
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=8 * size.width // 3 // 64 * 64,
            num_hidden_layers=size.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
        )
    )
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": ["rows"], "validation": {"general": "rows"}, "max_length": size.length},
        "sft": {
            "batch_size": 2 * size.micro * case.ranks,
            "micro_batch_size": size.micro,
            "epochs": 1,
        },
        "probe": {"epochs": 0, "tokens_per_microbatch": size.micro * size.length},
        "select": {"budget": 1.0},
        "deepspeed": str(folder / "zero.json"),
    }
    for key, value in case.config.items():
        section, name = key.split(".")
        tree[section][name] = value
    model.to(getattr(torch, tree["model"]["dtype"])).save_pretrained(folder / "model")
    vocabulary = {f"w{i}": i for i in range(size.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", eos_token="w1"
    ).save_pretrained(folder / "model")
    settings = {
        "zero_optimization": case.zero,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (folder / "zero.json").write_text(json.dumps(settings))
    ids = torch.randint(2, size.vocabulary, (8 * size.micro * case.ranks, size.length)).tolist()
    rows = [
        {"sample_id": i, "input_ids": row, "labels": row, "sample_hash": str(i)}
        for i, row in enumerate(ids)
    ]
    for name in ("pool", "general"):
        Dataset.from_list(rows).save_to_disk(str(folder / "run/prepared" / name))
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"
