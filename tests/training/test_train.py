"""Training on sharded engines: the exported model is the engine's model, and world size does not
change what is learned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_model
from grads_ds.config.config import Config
from ranks import run_on_ranks

ROWS = 24


def make_rows(vocab: int = 100, length: int = 12) -> list[dict[str, Any]]:
    ids = np.random.default_rng(0).integers(7, vocab, (ROWS, length))
    return [{"input_ids": row.tolist(), "labels": [-100] * 3 + row.tolist()[3:]} for row in ids]


def make_config(base: Path, folder: Path, stage: int = 3, **sections: Any) -> Config:
    settings = folder / f"zero{stage}.json"
    settings.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "train_batch_size": "auto",
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            }
        )
    )
    sft = {
        "epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 5e-3,
    } | sections.pop("sft", {})
    return Config(
        run_dir=str(folder),
        deepspeed=str(settings),
        data=sections.pop("data", {"train": ["rows"]}),
        sft=sft,
        model={"path": str(base), "dtype": "float32"} | sections.pop("model", {}),
        **sections,
    )


def train(config: Config, name: str, **options: Any) -> None:
    from grads_ds.training.train import TrainingJob, optimizer_steps, train_model

    folder = Path(config.run_dir)
    train_model(
        TrainingJob(
            config,
            config.sft,
            make_rows(),
            config.model.path,
            folder / name,
            folder / f"{name}-work",
            folder / f"{name}-tb",
            optimizer_steps(ROWS, config.sft),
            what=name,
            **options,
            identity="test",
        )
    )


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([row["input_ids"] for row in make_rows()])
    with torch.no_grad():
        return model(ids).logits


def train_and_look(config: Config, name: str, **options: Any) -> np.ndarray:
    """Trains and exports; returns the logits of the model in the engine's memory, adapters
    unmerged.
    """
    from grads_ds.engine import model_folder
    from grads_ds.engine.model import gathered_parameters
    from grads_ds.training import train as training

    seen: dict[str, torch.Tensor] = {}
    original = model_folder.save_model

    def keep(model: Any, config: Config, folder: Path, card: str | None) -> None:
        ids = torch.tensor([row["input_ids"] for row in make_rows()])
        model.eval()
        with torch.no_grad(), gathered_parameters(list(model.parameters())):
            seen["logits"] = model(input_ids=ids).logits.float().clone()
        original(model, config, folder, card)

    training.save_model = keep
    train(config, name, **options)
    return seen["logits"].numpy()


def test_two_sharded_ranks_learn_and_export_what_one_process_learns(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", tied=True)
    for inside in run_on_ranks(2, train_and_look, make_config(base, tmp_path), "two"):
        torch.testing.assert_close(
            logits(tmp_path / "two"), torch.from_numpy(inside), atol=1e-4, rtol=0
        )
    run_on_ranks(1, train, make_config(base, tmp_path, stage=0), "one")
    assert (logits(tmp_path / "two") - logits(base)).abs().max() > 0.1  # it did train
    torch.testing.assert_close(
        logits(tmp_path / "two"), logits(tmp_path / "one"), atol=2e-3, rtol=1e-3
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template  # a chat model stays one
    assert not (tmp_path / "two-work").exists()
    names = json.loads((tmp_path / "two/config.json").read_text())
    assert names["tie_word_embeddings"] is True


def train_lora(config: Config) -> np.ndarray:
    return train_and_look(
        config, "lora", card="# made of", adapter_dir=Path(config.run_dir) / "adapter"
    )


def test_adapters_are_merged_into_a_plain_model_or_put_on_the_base(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", tied=False)
    config = make_config(base, tmp_path, model={"lora": {"r": 4, "alpha": 16}})
    for inside in run_on_ranks(2, train_lora, config):
        torch.testing.assert_close(
            logits(tmp_path / "lora"), torch.from_numpy(inside), atol=1e-4, rtol=0
        )
    assert (logits(tmp_path / "lora") - logits(base)).abs().max() > 1e-3
    assert not (tmp_path / "lora/adapter_config.json").exists()
    assert (tmp_path / "lora/README.md").read_text() == "# made of"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = torch.tensor([row["input_ids"] for row in make_rows()])
    torch.testing.assert_close(adapted(ids).logits, logits(tmp_path / "lora"), atol=1e-4, rtol=0)


def save_in_shards(config: Config) -> None:
    from grads_ds.engine import model_folder
    from grads_ds.engine.model import frozen_model

    model_folder.SHARD_BYTES = 20_000
    with frozen_model(config, config.model.path) as (model, _):
        model_folder.save_model(model, config, Path(config.run_dir) / "sharded")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_written_in_shards_is_the_model_that_was_loaded(tmp_path: Path, tied: bool) -> None:
    base = make_tiny_model(tmp_path / "base", tied=tied)
    run_on_ranks(2, save_in_shards, make_config(base, tmp_path))
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits(tmp_path / "sharded"), logits(base), atol=0, rtol=0)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "inverse_sqrt"])
def test_a_training_of_few_steps_has_a_learning_rate_above_zero(scheduler: str) -> None:
    from transformers import get_scheduler

    from grads_ds.config.training import SftConfig
    from grads_ds.training.train import warmup_steps

    for steps, ratio in ((1, 0.03), (1, 0.9), (2, 0.03), (2, 0.9), (100, 0.03), (1, 0.0)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        warm = warmup_steps(steps, SftConfig(warmup_ratio=ratio))
        schedule = get_scheduler(scheduler, optimizer, warm, steps)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert max(rates) >= 0.5, (steps, ratio)
    assert warmup_steps(100, SftConfig(warmup_ratio=0.03)) == 3
