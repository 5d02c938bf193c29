"""A small training of the transformers Trainer, recorded, for the tests of the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import TrainerCallback

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder

ROWS = 22


def rows(number: int = ROWS, seed: int = 0) -> Dataset:
    """Rows of different lengths with masked prompts, ids that are not their numbers, and a column
    of text to be dropped.
    """
    draw = np.random.default_rng(seed)
    made = []
    for row in range(number):
        ids = draw.integers(3, models.VOCAB, draw.integers(4, 14)).tolist()
        prompt = int(draw.integers(1, len(ids)))
        labels = [-100] * prompt + ids[prompt:]
        made.append(
            {
                "input_ids": ids,
                "labels": labels,
                "sample_id": 1000 - 7 * row,
                "source": f"row {row}",
            }
        )
    return Dataset.from_list(made)


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*s[name], *[fill] * (longest - len(s[name]))] for s in samples])

    mask = [[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in samples]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


class Snapshots(TrainerCallback):
    """The weights that each optimizer step started from."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.weights[state.global_step] = {
            name: value.clone() for name, value in model.state_dict().items()
        }


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a short training: two micro-batches of three to a step, rows shuffled."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "max_grad_norm": 1.0,
        "optim": "sgd",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    } | changes


def compare(
    table: Path, data: Dataset, weights: dict[int, dict[str, torch.Tensor]], rtol: float = 1e-5
) -> int:
    """Every sample of the table against a float64 backward at the weights of its step; returns how
    many steps there are.
    """
    found = pq.read_table(table).to_pylist()
    assert [row["sample_id"] for row in found] == sorted(data["sample_id"])
    by_id = {row["sample_id"]: row for row in data}
    model = models.make_model("llama-tied")
    recorder = GradNormRecorder(model, "all")
    for row in found:
        model.load_state_dict(weights[row["step"]])
        sample = by_id[row["sample_id"]]
        true = models.truth(recorder, model, collate([sample]))
        for group, norm in true.norms.items():
            np.testing.assert_allclose(row[f"{group}_grad_norm"], float(norm[0]), rtol=rtol)
        np.testing.assert_allclose(row["loss"], float(true.loss[0]), rtol=rtol)
        assert row["num_tokens"] == len(sample["input_ids"])
        assert row["num_target_tokens"] == sum(label != -100 for label in sample["labels"][1:])
        assert row["status"] == "ok"
    return len({row["step"] for row in found})
