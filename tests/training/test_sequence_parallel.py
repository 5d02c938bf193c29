"""Ranks that share each sample's tokens learn what ranks with samples of their own learn: losses
and gradients, resumed too.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.training.division import check_training
from ranks import run_on_ranks
from tests.training.test_checkpoints import Ends, Stopped
from tests.training.test_train import ROWS, make_config
from tests.training.test_trainer import uneven_rows

STEPS = 7  # over two epochs of three steps
FEW = 4  # of them, over one epoch


class Curve(TrainerCallback):
    """Loss and gradient norm of every step."""

    points: list[tuple[float, float]]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.points = [(e["loss"], float(e["grad_norm"])) for e in state.log_history if "loss" in e]


def train(
    config: Config, name: str, sequence: int, ends_at: int | None = None
) -> list[tuple[float, float]]:
    from grads_ds.training.train import TrainingJob, train_model

    folder, curve, ends = Path(config.run_dir), Curve(), Ends(ends_at, kill=False)
    rows = uneven_rows([0.5 + n % 3 for n in range(ROWS)])
    with contextlib.suppress(Stopped):
        train_model(
            TrainingJob(
                config,
                config.sft,
                rows,
                config.model.path,
                folder / name,
                folder / f"{name}-work",
                folder / f"{name}-tb",
                STEPS,
                what=name,
                sequence=sequence,
                callbacks=[curve, ends],
                identity="test",
            )
        )
    return [*curve.points, (float(ends.begins or 0), 0.0)]


def train_in_turn(config: Config, lora: Config) -> dict[str, list[tuple[float, float]]]:
    """One after the other in the same processes, as the variants of one run are."""
    found = {"ranks": train(config, "ranks", 1)}
    assert len(train(config, "groups", 2, ends_at=5)) == 5 + 1
    found["groups"] = train(config, "groups", 2)
    found["ranks again"] = train(config, "again", 1, ends_at=FEW)
    found["lora ranks"] = train(lora, "lora", 1, ends_at=FEW)
    return found | {"lora groups": train(lora, "shared", 2, ends_at=FEW)}


@pytest.mark.slow
def test_groups_of_ranks_learn_what_single_ranks_learn(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base", layers=1)
    sft = {"batch_size": 8, "micro_batch_size": 2, "checkpoint_steps": 2}
    config = make_config(tmp_path / "base", tmp_path, sft=sft)
    lora = make_config(tmp_path / "base", tmp_path, sft=sft, model={"lora": {"r": 4, "alpha": 16}})
    found = run_on_ranks(2, train_in_turn, config, lora)[0]
    *plain, _ = found["ranks"]
    begins, _ = found["groups"][-1]
    assert begins == 4 and len(plain) == STEPS and plain[-1][0] < plain[0][0] - 0.1
    for name in found:
        *curve, _ = found[name]
        wanted = found["lora ranks"][:-1] if "lora" in name else plain
        wanted = wanted[: FEW if name.endswith("again") else None]
        for one, other in zip(curve, wanted, strict=True):
            assert one == pytest.approx(other, abs=1e-4), name


@pytest.mark.parametrize(
    ("stage", "sequence", "changes", "found"),
    [
        (3, 3, {}, "wanted a divisor of the 4 ranks; found 3"),
        (2, 2, {}, "wanted zero_optimization with stage 3"),
        (
            3,
            2,
            {"zero_optimization": {"stage": 3, "reduce_scatter": False}},
            "wanted zero_optimization with stage 3 and reduce_scatter",
        ),
        (
            3,
            1,
            {"sequence_parallel_size": 2},
            "wanted no sequence_parallel_size; found 2; set sft.sequence_parallel instead",
        ),
    ],
)
def test_what_would_train_otherwise_is_refused(
    tmp_path: Path, stage: int, sequence: int, changes: dict[str, Any], found: str
) -> None:
    config = make_config(
        tmp_path / "base", tmp_path, stage=stage, sft={"sequence_parallel": sequence}
    )
    file = Path(config.deepspeed)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (fault,) = check_training(config, "sft", config.sft, 4)
    assert found in fault


@pytest.mark.parametrize(
    ("heads", "pairs", "sequence", "found"),
    [
        (8, 8, 4, None),
        (8, 2, 4, None),  # key-value heads are repeated
        (6, 6, 4, "wanted a divisor of its 6 attention heads; found 4"),
        (12, 3, 4, "wanted a divisor or a multiple of its 3 key-value heads; found 4"),
        (12, None, 4, None),  # as many as there are heads
    ],
)
def test_heads_that_a_group_cannot_share_are_refused_before_work_starts(
    tmp_path: Path, heads: int, pairs: int | None, sequence: int, found: str | None
) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": pairs}
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(shape))
    config = make_config(
        tmp_path / "base", tmp_path, sft={"sequence_parallel": sequence, "batch_size": 4}
    )
    faults = check_training(config, "sft", config.sft, 4)
    assert bool(faults) == bool(found) and all(found in fault for fault in faults)


def test_groups_count_where_a_batch_is_dealt_out(tmp_path: Path) -> None:
    sft = {"batch_size": 2, "micro_batch_size": 1, "sequence_parallel": 2}
    config = make_config(tmp_path / "base", tmp_path, sft=sft)
    assert not check_training(config, "sft", config.sft, 4)  # two groups, a sample each
    (fault,) = check_training(config, "sft", config.sft, 8)
    assert "cannot be shared equally by 4 groups of 2 ranks" in fault


def test_packing_and_eager_attention_are_refused_with_it(tmp_path: Path) -> None:
    sft = {"sequence_parallel": 2, "packing": True}
    with pytest.raises(UserError) as refused:
        make_config(tmp_path / "base", tmp_path, sft=sft, model={"attention": "eager"})
    assert [fault.partition(":")[0] for fault in refused.value.problems] == [
        "sft.sequence_parallel",
        "sft.packing",
    ]


def fail_to_load(config: Config) -> bool:
    """Whether the process's attention is its own again after a load that failed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from grads_ds.config.errors import UserError

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(UserError, match="model"):
        train(config, "never", 2)
    return ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_a_load_that_fails_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"no weights")
    assert run_on_ranks(2, fail_to_load, make_config(base, tmp_path)) == [True, True]
