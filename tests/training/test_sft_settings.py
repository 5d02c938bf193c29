"""What a DeepSpeed file or a config asks for reaches the engine and trains as it should: stages,
offload, ZeRO++, bf16, recomputing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from conftest import make_tiny_model
from grads_ds.config.config import Config
from ranks import run_on_ranks
from tests.training.test_train import make_config
from tests.training.test_trainer import Logs, uneven_rows

STEPS = 6
CPU, OFFLOADS = {"device": "cpu"}, {"optimizer offloads": True}
LORA: dict[str, Any] = {"lora": {"r": 4, "alpha": 16}, "dtype": "float32"}
ADAPTING = {"sft": {"learning_rate": 0.02}}  # adapters want a higher rate
# torch's Adam: DeepSpeed's own is compiled for a minute and a half on each new machine
TORCH = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
OFFLOADED = {"file": {"optimizer": {"type": "AdamW", "params": TORCH}}}
# name: (zero_optimization, sections of the config, what the engine must say of itself, tolerance of
# the losses)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], float]] = {
    "ZeRO-3": ({"stage": 3}, {}, {"zero": "DeepSpeedZeroOptimizer_Stage3"}, 0),
    "ZeRO-2": ({"stage": 2}, {}, {"zero": "DeepSpeedZeroOptimizer"}, 1e-5),
    "recomputed": (
        {"stage": 3},
        {"sft": {"gradient_checkpointing": True}},
        {"recomputes": True},
        1e-5,
    ),
    "hpZ": ({"stage": 3, "zero_hpz_partition_size": 2}, {}, {"secondary": True}, 1e-5),
    "bf16": ({"stage": 3}, {"model": {"dtype": "bfloat16"}}, {"dtype": "torch.bfloat16"}, 2e-2),
    "offload under ZeRO-2": (
        {"stage": 2, "offload_optimizer": CPU},
        OFFLOADED,
        {"adam": "AdamW"} | OFFLOADS,
        1e-4,
    ),
    "offload under ZeRO-3": (
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        OFFLOADED,
        {"adam": "AdamW", "offloads": True} | OFFLOADS,
        1e-4,
    ),
    "compiled offload under ZeRO-2": (
        {"stage": 2, "offload_optimizer": CPU},
        {},
        {"adam": "DeepSpeedCPUAdam"} | OFFLOADS,
        1e-4,
    ),
    "compiled offload under ZeRO-3": (
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
        {},
        {"adam": "DeepSpeedCPUAdam", "offloads": True} | OFFLOADS,
        1e-4,
    ),
    "LoRA": (
        {"stage": 3},
        {"model": LORA} | ADAPTING,
        {"adapters": True, "zero": "DeepSpeedZeroOptimizer_Stage3"},
        0,
    ),
    "LoRA under ZeRO-2": (
        {"stage": 2},
        {"model": LORA} | ADAPTING,
        {"adapters": True, "zero": "DeepSpeedZeroOptimizer"},
        1e-5,
    ),
    "LoRA in bf16": (
        {"stage": 3},
        {"model": LORA | {"dtype": "bfloat16"}} | ADAPTING,
        {"adapters": True, "dtype": "torch.bfloat16"},
        2e-2,
    ),
    "LoRA under ZeRO-3 with offload": (
        {"stage": 3, "offload_optimizer": CPU},
        {"model": LORA} | ADAPTING | OFFLOADED,
        {"adapters": True, "adam": "AdamW"} | OFFLOADS,
        1e-4,
    ),
    "LoRA under ZeRO-3 with compiled offload": (
        {"stage": 3, "offload_optimizer": CPU},
        {"model": LORA} | ADAPTING,
        {"adapters": True, "adam": "DeepSpeedCPUAdam"} | OFFLOADS,
        1e-4,
    ),
}
REFUSED = {
    "fp16": ({"stage": 3}, {"model": {"dtype": "float16"}}, "fp16 is not supported on your device"),
    "quantised weights": (
        {"stage": 3, "zero_quantized_weights": True},
        {},
        "not been implemented on CPU",
    ),
    "quantised gradients": (
        {"stage": 3, "zero_quantized_gradients": True},
        {},
        "not been implemented on CPU",
    ),
}


class Facts(TrainerCallback):
    """What the engine is, seen from inside."""

    secondary = False

    def on_substep_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # hpZ's second copy of the shards lives from a step's first forward to the optimizer's step
        self.secondary |= any(
            getattr(p, "ds_secondary_tensor", None) is not None for p in model.parameters()
        )

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        zero = optimizer.optimizer
        parameters = list(model.parameters())
        self.found = {
            "zero": type(zero).__name__,
            "adam": type(zero.optimizer).__name__,
            "offloads": bool(getattr(zero, "offload_param", False)),
            "optimizer offloads": any(
                getattr(zero, name, False) for name in ("offload_optimizer", "cpu_offload")
            ),
            "recomputes": any(
                getattr(module, "gradient_checkpointing", False) for module in model.modules()
            ),
            "secondary": self.secondary,
            "adapters": all(
                ("lora_" in name) == p.requires_grad for name, p in model.named_parameters()
            ),
            "dtype": str(parameters[0].dtype),
        }


def config_of(folder: Path, name: str, zero: dict[str, Any], sections: dict[str, Any]) -> Config:
    sft = {"micro_batch_size": 2} | sections.get("sft", {})  # two accumulation steps
    of_file = sections.get("file", {})  # top-level settings of the DeepSpeed file
    sections = {key: value for key, value in sections.items() if key != "file"}
    config = make_config(folder / "base", folder, **sections | {"sft": sft})
    whole = json.loads(Path(config.deepspeed).read_text()) | of_file
    file = folder / f"{name}.json"
    file.write_text(json.dumps(whole | {"zero_optimization": whole["zero_optimization"] | zero}))
    return config.model_copy(update={"deepspeed": str(file)})


def train(config: Config, name: str) -> tuple[list[float], dict[str, Any]]:
    from grads_ds.training.train import TrainingJob, train_model

    folder, logs, facts = Path(config.run_dir), Logs(), Facts()
    train_model(
        TrainingJob(
            config,
            config.sft,
            uneven_rows(),
            config.model.path,
            folder / name,
            folder / f"{name}-work",
            folder / f"{name}-tb",
            STEPS,
            what=name,
            callbacks=[logs, facts],
            identity="test",
        )
    )
    return logs.losses, facts.found


def train_all(configs: dict[str, Config]) -> dict[str, tuple[list[float], dict[str, Any]]]:
    return {name: train(config, name) for name, config in configs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("baseline", "falls", "compiled"),
    [
        ("ZeRO-3", 0.1, False),
        ("LoRA", 0.05, False),
        pytest.param("ZeRO-3", 0.1, True, marks=pytest.mark.long),
        pytest.param("LoRA", 0.05, True, marks=pytest.mark.long),
    ],
)
def test_every_setting_reaches_the_engine_and_learns_what_zero_3_learns(
    tmp_path: Path, baseline: str, falls: float, compiled: bool
) -> None:
    if compiled and not shutil.which("c++"):
        pytest.skip("needs c++: DeepSpeed compiles its CPU optimizer")
    make_tiny_model(tmp_path / "base", layers=1)
    cases = {
        name: case
        for name, case in CASES.items()
        if ("LoRA" in name) == (baseline == "LoRA")
        and (("compiled" in name) == compiled or name == baseline)
    }
    configs = {
        name: config_of(tmp_path, name, zero, sections)
        for name, (zero, sections, *_) in cases.items()
    }
    trained = run_on_ranks(2, train_all, configs)[0]
    plain, base = trained[baseline]
    assert len(plain) == STEPS and plain[-1] < plain[0] - falls
    for name, (_, _, wanted, tolerance) in cases.items():
        losses, found = trained[name]
        assert {key: found[key] for key in wanted} == wanted, name
        assert losses == pytest.approx(plain, abs=tolerance), name
    # what is looked for above is not there by itself
    assert base["adapters"] == (baseline == "LoRA")
    assert (
        not any(base[key] for key in ("recomputes", "secondary", "offloads", "optimizer offloads"))
        and base["dtype"] == "torch.float32"
    )


def errors(configs: dict[str, Config]) -> dict[str, str]:
    found = {}
    for name, config in configs.items():
        try:
            train(config, name)
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.mark.slow
def test_what_deepspeed_cannot_do_on_a_cpu_ends_in_its_own_words_and_not_in_another_training(
    tmp_path: Path,
) -> None:
    """Seen with DeepSpeed 0.19.8; where this fails, a newer one can, and its place is above."""
    from deepspeed.accelerator import get_accelerator

    make_tiny_model(tmp_path / "base")
    refused = dict(REFUSED)
    if get_accelerator().is_fp16_supported():  # processors with AVX512-FP16 train in it
        del refused["fp16"]
    configs = {
        name: config_of(tmp_path, name, zero, sections)
        for name, (zero, sections, _) in refused.items()
    }
    for found in run_on_ranks(2, errors, configs):
        assert set(found) == set(refused)
        for name, (*_, words) in refused.items():
            assert words in found[name]
