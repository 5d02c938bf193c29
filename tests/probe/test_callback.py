"""The callback writes the norms each sample had at the weights of its step, inside other people's
trainers, on one rank and two.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from conftest import REPO, write_rows
from gradnorm import small_models as models
from grads_ds import GradNormCallback
from grads_ds.gradnorm import GradNormRecorder
from ranks import run_on_ranks

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


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer(tmp_path: Path, workers: int) -> None:
    data, snapshots = rows(), Snapshots()
    model = models.make_model("llama-tied")
    callback = GradNormCallback(tmp_path / "scores", data, "all")
    arguments = TrainingArguments(
        **settings(tmp_path, num_train_epochs=2, dataloader_num_workers=workers)
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[callback, snapshots],
    )
    trainer.train()
    assert (
        compare(tmp_path / "scores/table.parquet", data, snapshots.weights)
        == 4
        < len(snapshots.weights)
        == 8
    )
    assert json.loads((tmp_path / "scores/manifest.json").read_text())["rows"] == ROWS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    twin = models.make_model("llama-tied")
    Trainer(model=twin, args=arguments, train_dataset=data, data_collator=collate).train()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        # training is the same with the callback and without
        torch.testing.assert_close(parameter, other, rtol=0, atol=0)


def on_two_ranks(folder: str, deepspeed: dict[str, Any] | None) -> dict[int, Any] | None:
    """Trains on this rank; rank 0 returns the weights of every step, where they are whole."""
    data, snapshots = rows(), Snapshots()
    model = models.make_model("llama-tied")  # before ZeRO-3 takes models apart as they are made
    arguments = TrainingArguments(**settings(Path(folder), deepspeed=deepspeed))
    callbacks = [
        GradNormCallback(Path(folder, "scores"), data, "all"),
        *([] if deepspeed else [snapshots]),
    ]
    Trainer(model, arguments, collate, data, callbacks=callbacks).train()
    return snapshots.weights


ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.slow
def test_trainer_on_two_ranks_and_under_zero_3(tmp_path: Path) -> None:
    weights = run_on_ranks(2, on_two_ranks, str(tmp_path / "ddp"), None)[0]
    compare(tmp_path / "ddp/scores/table.parquet", rows(), weights)
    run_on_ranks(2, on_two_ranks, str(tmp_path / "zero"), ZERO3)
    # The same steps, up to rounding: the samples the last batch borrowed to be full have only their
    # first record.
    tables = [
        pq.read_table(tmp_path / kind / "scores/table.parquet").to_pandas()
        for kind in ("ddp", "zero")
    ]
    np.testing.assert_allclose(*(table["total_grad_norm"] for table in tables), rtol=1e-3)


@pytest.mark.parametrize(("padding_free", "bf16"), [(False, False), (True, False), (False, True)])
def test_trl(tmp_path: Path, padding_free: bool, bf16: bool) -> None:
    trl = pytest.importorskip("trl")
    data, snapshots = rows(), Snapshots()
    callback = GradNormCallback(tmp_path / "scores", data, "all")
    arguments = trl.SFTConfig(
        **settings(tmp_path),
        padding_free=padding_free,
        max_length=None,
        pad_token="<pad>",
        bf16=bf16,
        gradient_checkpointing=not padding_free,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = trl.SFTTrainer(
        model=models.make_model("llama-tied"),
        args=arguments,
        train_dataset=data,
        callbacks=[callback, snapshots],
        processing_class=tokenizer(),
    )
    trainer.train()
    assert (
        compare(tmp_path / "scores/table.parquet", data, snapshots.weights, 2e-2 if bf16 else 1e-5)
        == 4
    )


def tokenizer() -> Any:
    """One whose padding token is 0, as in the models."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, models.VOCAB)}
    inner = Tokenizer(kinds.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_going_on_from_a_checkpoint_and_starting_anew(tmp_path: Path) -> None:
    data = rows()

    def train(epochs: float, stop: int | None, resume: bool) -> list[dict[str, Any]]:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step == stop
                control.should_save = state.global_step == 2

        model = models.make_model("llama-tied")
        callback = GradNormCallback(tmp_path / "scores", data)
        arguments = TrainingArguments(**settings(tmp_path, num_train_epochs=epochs))
        trainer = Trainer(model, arguments, collate, data, callbacks=[Stop(), callback])
        trainer.train(resume_from_checkpoint=resume or None)
        table = tmp_path / "scores/table.parquet"
        return pq.read_table(table).to_pylist() if table.exists() else []

    whole = train(1, None, False)
    (tmp_path / "scores/table.parquet").unlink()
    assert not train(1, 3, False)  # stopped after the checkpoint
    assert train(1, None, True) == whole
    assert train(1, None, False) == whole  # the parts of the earlier starts do not mix in


def test_a_training_that_was_interrupted_leaves_nothing_in_the_way_of_the_next(
    tmp_path: Path,
) -> None:
    class Interrupt(TrainerCallback):
        times = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and not self.times:
                self.times = 1
                raise KeyboardInterrupt

    data, snapshots = rows(), Snapshots()
    callbacks = [GradNormCallback(tmp_path / "scores", data, "all"), snapshots, Interrupt()]
    trainer = Trainer(
        models.make_model("llama-tied"),
        TrainingArguments(**settings(tmp_path)),
        collate,
        data,
        callbacks=callbacks,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert compare(tmp_path / "scores/table.parquet", data, snapshots.weights) == 4


def test_settings_that_cannot_be_recorded_are_named_together(tmp_path: Path) -> None:
    data = rows()
    arguments = TrainingArguments(
        **settings(tmp_path, label_smoothing_factor=0.1, torch_compile=True)
    )
    callback = GradNormCallback(tmp_path / "scores", data.select(range(5)))
    trainer = Trainer(models.make_model("llama"), arguments, collate, data, callbacks=[callback])
    with pytest.raises(
        ValueError, match=r"(?s)label_smoothing_factor 0.1.*torch_compile.*22 rows of 5"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="different in every row"):
        GradNormCallback(
            tmp_path,
            data.add_column("x", [0] * ROWS)
            .remove_columns("sample_id")
            .rename_column("x", "sample_id"),
        )


@pytest.mark.slow
def test_the_example(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("trl")
    chats = write_rows(tmp_path / "chats.jsonl", 12)
    command = [
        sys.executable,
        str(REPO / "scripts/examples/trainer_callback.py"),
        str(tiny_model),
        str(chats),
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("targets\n") == 6
    table = pq.read_table(tmp_path / "scores/table.parquet")
    assert (
        table["sample_id"].to_pylist() == list(range(12))
        and min(table["lm_head_grad_norm"].to_pylist()) > 0
    )


def test_the_manual_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = rows()
    known = {
        "model": models.make_model("llama"),
        "batch": collate(data.select(range(4)).to_list()),
        "Trainer": Trainer,
        "general_batch": collate(data.select([5, 6]).to_list()),
        "arguments": TrainingArguments(**settings(tmp_path)),
        "collator": collate,
        "rows": data,
    }
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs/gradnorm.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, known)
    assert len(blocks) == 2 and len(pq.read_table("scores/table.parquet")) == ROWS
