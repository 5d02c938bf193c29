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
from transformers import Trainer, TrainingArguments

from conftest import REPO, write_rows
from gradnorm import small_models as models
from grads_ds import GradNormCallback
from ranks import run_on_ranks
from tests import forked_ranks
from tests.probe.trainings import ROWS, Snapshots, collate, compare, rows, settings


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
        env=os.environ | {"PYTHONPATH": forked_ranks.python_path(), "FORK_ALL": "1"},
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
