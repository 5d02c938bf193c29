"""`sft.trainer` sets every option of transformers' trainer that works with DeepSpeed here, and says
of each other one why not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.config.trainer_options import (
    BITSANDBYTES,
    PLAIN_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    TrainerOptions,
)
from grads_ds.training.trainer_problems import check_trainer
from ranks import run_on_ranks
from tests.training.test_train import make_config
from tests.training.test_trainer import Logs, uneven_rows

TOGETHER: dict[str, Any] = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "full_determinism": True,
    "torch_empty_cache_steps": 2,
    "logging_steps": 2,
    "logging_first_step": True,
    "run_name": "one",
    "project": "two",
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "dataloader_pin_memory": False,
    "train_sampling_strategy": "group_by_length",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"trainer": {"neftune_noise_alpha": 50.0}},
    "seed": {"trainer": {"seed": 7}},
    "data seed": {"trainer": {"data_seed": 7}},
    "in order": {"trainer": {"train_sampling_strategy": "sequential"}},
    "together": {
        "trainer": TOGETHER,
        "lr_scheduler": "cosine_with_min_lr",
        "gradient_checkpointing": True,
    },
    **{name: {"trainer": {"optim": name}} for name in PLAIN_OPTIMIZERS if name != "adamw_torch"},
    "arguments": {"trainer": {"optim": "sgd", "optim_args": "momentum=0.9"}},
}
LONGER = ("plain", "together")  # into a second epoch, with the loader's workers that stay


def given(tmp_path: Path, trainer: dict[str, Any], **sft: Any) -> list[str]:
    """The problems of a config with this sft.trainer; none when it loads."""
    file = tmp_path / "config.yaml"
    tree = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["x"]}}
    file.write_text(json.dumps(tree | {"sft": {"trainer": trainer} | sft}))
    try:
        load_config(file)
    except UserError as error:
        return error.problems
    return []


def test_every_option_of_the_installed_trainer_can_be_set_or_has_its_reason() -> None:
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = set(TrainerOptions.model_fields)
    assert fields | set(TrainerOptions.REFUSED) == names
    assert not fields & set(TrainerOptions.REFUSED)
    known = [*PLAIN_OPTIMIZERS, *BITSANDBYTES, *REFUSED_OPTIMIZERS]
    assert sorted(known) == sorted(name.value for name in OptimizerNames)


def test_a_refused_option_tells_why_and_a_misspelt_one_its_nearest_name(tmp_path: Path) -> None:
    asked = {"bf16": True, "fsdp": "full_shard", "neftune_noise_alfa": 5, "adam_beta1": 2}
    found = {text.split(":")[0]: text for text in given(tmp_path, asked)}
    assert found["sft.trainer.bf16"].endswith("cannot be set; set model.dtype")
    assert "DeepSpeed shards" in found["sft.trainer.fsdp"]
    assert "did you mean neftune_noise_alpha?" in found["sft.trainer.neftune_noise_alfa"]
    assert "less than 1; found 2" in found["sft.trainer.adam_beta1"] and len(found) == 4
    assert "works on whole matrices" in given(tmp_path, {"optim": "galore_adamw"})[0]
    assert "did you mean adafactor?" in given(tmp_path, {"optim": "adafaktor"})[0]


def test_what_cannot_work_here_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    asked = {"optim": "adamw_8bit", "use_liger_kernel": True, "tf32": True}
    config = make_config(
        tmp_path / "base", tmp_path, sft={"trainer": asked | {"report_to": ["trackio"]}}
    )
    found = "\n".join(check_trainer(config))
    for name in asked:
        assert f"sft.trainer.{name}: wanted a CUDA device" in found
    monkeypatch.setitem(sys.modules, "trackio", None)
    for text in ("pip install 'grads-ds[bitsandbytes]'", "pip install 'grads-ds[trackio]'"):
        assert text in "\n".join(check_trainer(config))


def test_what_the_deepspeed_file_takes_over_is_not_set_twice(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    config = make_config(
        tmp_path / "base",
        tmp_path,
        sft={"trainer": {"optim": "sgd", "adam_beta1": 0.5, "lr_scheduler_kwargs": {"a": 1}}},
    ).model_copy(update={"deepspeed": str(file)})
    file.write_text('{"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}')
    names = [text.split(":")[0].rpartition(".")[2] for text in check_trainer(config)]
    assert names == ["optim", "adam_beta1", "lr_scheduler_kwargs"]
    file.write_text('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}')
    assert "DeepSpeed steps with its own Adam" in check_trainer(config)[0]
    file.write_text("{}")
    assert check_trainer(config) == []


def train_all(configs: dict[str, Config]) -> dict[str, tuple[list[float], str, dict[str, Any]]]:
    """Of each config: losses, the optimizer inside the engine, its first group's settings."""
    from grads_ds.training.train import TrainingJob, train_model

    class Look(Logs):
        def on_step_end(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            inner = optimizer.optimizer.optimizer
            plain = {k: v for k, v in inner.param_groups[0].items() if k != "params"}
            self.inside = type(inner).__name__, plain

    found = {}
    for name, config in configs.items():
        look, folder = Look(), Path(config.run_dir)
        train_model(
            TrainingJob(
                config,
                config.sft,
                uneven_rows(),
                config.model.path,
                folder / name,
                folder / f"{name}-work",
                folder / f"{name}-tb",
                4 if name in LONGER else 2,
                what=name,
                identity=name,
                callbacks=[look],
            )
        )
        found[name] = (look.losses, *look.inside)
    return found


@pytest.mark.slow
def test_every_option_trains_under_zero_3_and_does_what_it_says(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", layers=1)
    configs = {
        name: make_config(base, tmp_path, sft={"learning_rate": 1e-3} | sft)
        for name, sft in CASES.items()
    }
    # under full_determinism torch fills what it allocates, a bucket of half a billion elements too
    file = Path(configs["plain"].deepspeed)
    settings = json.loads(file.read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = 10_000
    file.write_text(json.dumps(settings))
    (found,) = run_on_ranks(1, train_all, configs)
    plain = found["plain"][0]
    assert all(np.isfinite(losses).all() for losses, *_ in found.values())
    assert found["noise"][0][0] != pytest.approx(plain[0], abs=1e-4)
    for name in ("seed", "data seed", "in order"):
        assert found[name][0][0] != pytest.approx(plain[0], abs=1e-6), name
    assert found["seed"][0] == pytest.approx(found["data seed"][0], abs=1e-6)
    _, optimizer, settings = found["together"]
    assert settings["betas"] == (0.8, 0.95) and settings["eps"] == 1e-7
    assert settings["lr"] == pytest.approx(5e-4)  # after the last step: half the peak
    kinds = {"adafactor": "Adafactor", "sgd": "SGD", "rmsprop": "RMSprop"}
    assert {name: found[name][1] for name in kinds} == kinds
    assert found["arguments"][2]["momentum"] == 0.9 and "Adam" in optimizer


OFFLINE = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
    "trackio": {"TRACKIO_DIR": "trackio"},
}


def track(tracker: str, config: Config) -> list[str]:
    """Train with the tracker, offline; the files it left in the folder."""
    folder = Path(config.run_dir)
    os.chdir(folder)
    os.environ.update(OFFLINE[tracker])
    before = set(folder.rglob("*"))
    train_all({"tracked": config})
    ours = ("tracked", "tracked-work", "tracked-tb")
    new = [str(file.relative_to(folder)) for file in set(folder.rglob("*")) - before]
    return [name for name in new if name.split("/")[0] not in ours]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", list(OFFLINE))
def test_a_tracker_that_is_installed_keeps_the_run_offline(tmp_path: Path, tracker: str) -> None:
    if find_spec(tracker) is None:
        pytest.skip(f"needs the package {tracker} (pip install 'grads-ds[{tracker}]')")
    base = make_tiny_model(tmp_path / "base")
    trainer = {"report_to": [tracker], "project": "trial", "run_name": "one"}
    (left,) = run_on_ranks(1, track, tracker, make_config(base, tmp_path, sft={"trainer": trainer}))
    kept = {"wandb": "wandb/offline-run-", "mlflow": "mlflow.db", "trackio": "trackio/"}
    assert any(name.startswith(kept[tracker]) for name in left), left


def test_a_tracker_changes_no_result_and_a_seed_does(tmp_path: Path) -> None:
    options = TrainerOptions(report_to=["tensorboard", "mlflow"], seed=3)
    assert options.arguments()["report_to"] == ["mlflow"]
    plain = make_config(tmp_path / "base", tmp_path).sft
    tracked = make_config(
        tmp_path / "base", tmp_path, sft={"trainer": {"report_to": ["mlflow"]}}
    ).sft
    seeded = make_config(tmp_path / "base", tmp_path, sft={"trainer": {"seed": 3}}).sft
    assert plain.inputs() == tracked.inputs() != seeded.inputs()
