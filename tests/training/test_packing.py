"""Packed training is the unpacked training, step by step, and a model that would mix the samples is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.training.packing import PackingCheck, PackingCollator, first_fit
from grads_ds.training.trainer import WEIGHTS, Collator, target_weights, weighted_loss
from ranks import run_on_ranks
from tests.training.test_train import ROWS, logits, make_config
from tests.training.test_trainer import train, uneven_rows


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
def test_every_sample_lies_in_one_bin_and_no_bin_overflows(
    lengths: list[int], capacity: int
) -> None:
    bins = first_fit(lengths, capacity)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= capacity for bin_ in bins)
    # else two bins would be one
    assert sum(sum(lengths[i] for i in bin_) <= capacity // 2 for bin_ in bins) <= 1


def config_of(folder: Path, **sections: Any) -> Config:
    data = {"train": ["rows"], "max_length": 64}
    return make_config(make_tiny_model(folder / "base"), folder, data=data, **sections)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_a_packed_batch_has_the_loss_and_gradient_of_the_padded_one(
    tmp_path: Path, attention: str
) -> None:
    config = config_of(tmp_path, model={"attention": attention})
    rows = list(uneven_rows([0.5 + n % 4 for n in range(ROWS)]))[:9]
    packed, padded = PackingCollator(config, 0)(rows), Collator(0)(rows)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    assert (len(packed["input_ids"]) == 1) == (attention == "flash_attention_2")
    assert target_weights(packed).sum() == target_weights(padded).sum()
    if attention == "flash_attention_2":
        attention = "sdpa"  # the kernel needs a GPU; one long row is tried with what runs here
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float64, attn_implementation=attention
    )
    found = []
    for batch in (packed, padded):
        inputs = {name: value for name, value in batch.items() if name not in (WEIGHTS, "labels")}
        loss = weighted_loss(model(**inputs, use_cache=False).logits, batch)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def train_both_ways(config: Config, rows: Dataset) -> tuple[list[float], list[float]]:
    packed = train(config, "packed", rows, 6, packing=True).losses
    return packed, train(config, "padded", rows, 6).losses


def test_packed_training_is_the_unpacked_training(tmp_path: Path) -> None:
    config = config_of(tmp_path, sft={"micro_batch_size": 4, "batch_size": 16})
    packed, padded = run_on_ranks(2, train_both_ways, config, uneven_rows())[0]
    assert len(packed) == 6 and padded[-1] < padded[0] - 0.1  # it did train
    assert packed == pytest.approx(padded, abs=1e-4)
    torch.testing.assert_close(
        logits(tmp_path / "packed"), logits(tmp_path / "padded"), atol=2e-3, rtol=0
    )


@pytest.mark.slow
@pytest.mark.long
def test_packed_training_of_the_real_model_is_the_unpacked_training(
    tmp_path: Path, material: Path
) -> None:
    """Answers of MedQuAD on the pretrained 8M model, its own template; the test above is its twin
    without the material.
    """
    base, longest = material / "models/base-8M", 160
    tokenizer, rows = AutoTokenizer.from_pretrained(base), []
    for line in (material / "data/medicine_medquad6k.jsonl").read_text().splitlines()[:400]:
        said = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, targets = said["input_ids"], said["assistant_masks"]
        if len(ids) <= longest and len(rows) < 16:
            labels = [token if target else -100 for token, target in zip(ids, targets, strict=True)]
            rows.append({"input_ids": ids, "labels": labels})
    sft = {"micro_batch_size": 4, "batch_size": 8, "learning_rate": 1e-3}
    config = make_config(
        base, tmp_path, sft=sft, data={"train": ["rows"], "max_length": 2 * longest}
    )
    batch = PackingCollator(config, 0)(rows[:4])
    assert len(rows) == 16 and len(batch["input_ids"]) < 4  # samples do share rows
    packed, padded = run_on_ranks(1, train_both_ways, config, Dataset.from_list(rows))[0]
    assert sum(padded[3:]) < sum(padded[:3]) - 0.1
    assert packed == pytest.approx(padded, abs=1e-4)


def test_a_model_that_ignores_where_samples_begin_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = config_of(tmp_path)
    check = PackingCheck(PackingCollator(config, 0), uneven_rows())
    check.on_train_begin(
        None, None, None, model=AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    )
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UserError, match=r"sft\.packing: wanted a model that keeps .* apart"):
        check.on_train_begin(None, None, None, model=mamba)
