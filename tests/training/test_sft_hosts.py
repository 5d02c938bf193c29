"""Fine-tuning over two hosts, each with a rank, is the fine-tuning of one process: the same loss at
every optimizer step.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import Cluster, cluster
from conftest import make_tiny_model, write_rows
from grads_ds.config.load import load_config
from ranks import run_on_ranks
from tests import forked_ranks
from tests.probe.jobs import stage

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
LORA = "model.lora={r: 8, alpha: 16}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2) as two:
        yield two


def losses(run: Path) -> list[float]:
    """The loss of every optimizer step, as the TensorBoard curve has it."""
    events = EventAccumulator(str(run / "tensorboard/sft/selected"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, len(scalars) + 1))
    return [scalar.value for scalar in scalars]


def run_stages(folder: Path, stages: list[str], changes: tuple[str, ...]) -> None:
    """Stages of the config in `folder`, in this process."""
    os.chdir(folder)
    config = load_config("config.yaml", list(changes))
    for name in stages:
        stage(name, config)


def curves(folder: Path, hosts: Cluster, *changes: str) -> tuple[list[float], list[float]]:
    """The curves of one process and of two hosts on one and the same selection."""
    if not shutil.which("mpirun"):
        pytest.skip("needs mpirun (scripts/install.sh --dev)")
    run_on_ranks(1, run_stages, folder, ["prepare", "probe", "select"], changes)
    shutil.copytree(folder / "run", folder / "hosts")
    run_on_ranks(1, run_stages, folder, ["sft"], changes)
    call = [sys.executable, "-m", "grads_ds", "run", "config.yaml", "--to", "sft"]
    call += ["--hosts", str(hosts.hostfile), "--backend", "openmpi"]
    call += [word for change in (*changes, "run_dir=hosts") for word in ("--set", change)]
    variables = hosts.environment | {
        "PYTHONPATH": forked_ranks.python_path(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        call, cwd=folder, env=variables, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not list((folder / "hosts/logs").glob("probe/*"))  # fine-tuning alone ran there
    ran_on = list((folder / "hosts/logs/sft").glob("*/rank*.json"))
    assert len(ran_on) == len(hosts.addresses)
    return losses(folder / "run"), losses(folder / "hosts")


def write_config(folder: Path, model: Path, pool: Path, **sections: dict[str, object]) -> None:
    (folder / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    config = {
        "run_dir": "run",
        "model": {"path": str(model), "dtype": "float32"},
        "deepspeed": "zero3.json",
        "data": {"train": [str(pool)], "max_length": 192},
        "probe": {"epochs": 0, "layers": ["lm_head"]},
        "select": {"method": "random"} | sections["select"],
        "sft": {"batch_size": 8, "micro_batch_size": 2} | sections["sft"],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


# adapters on two sharded ranks: test_train.py
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="full"),
        pytest.param((LORA, "sft.learning_rate=0.05"), id="lora", marks=pytest.mark.long),
    ],
)
def test_a_small_model_learns_on_two_hosts_what_it_learns_in_one_process(
    hosts: Cluster, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    pool = write_rows(tmp_path / "pool.jsonl", 32)
    sft: dict[str, object] = {"epochs": 4, "learning_rate": 1e-2}
    write_config(
        tmp_path, make_tiny_model(tmp_path / "model"), pool, select={"budget": 24}, sft=sft
    )
    one, two = curves(tmp_path, hosts, *changes)
    assert len(one) == 12 and one[-1] < one[0] - 0.1  # it did train
    assert two == pytest.approx(one, abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("changes", [(), (LORA, "sft.learning_rate=0.01")], ids=["full", "lora"])
def test_the_real_model_learns_on_two_hosts_what_it_learns_in_one_process(
    hosts: Cluster, tmp_path: Path, material: Path, changes: tuple[str, ...]
) -> None:
    answers = (material / "data/medicine_medquad6k.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pool.jsonl").write_text("".join(answers[:60]))
    sft: dict[str, object] = {"epochs": 2, "learning_rate": 1e-3}
    write_config(
        tmp_path,
        material / "models/base-8M",
        tmp_path / "pool.jsonl",
        select={"budget": 48},
        sft=sft,
    )
    one, two = curves(tmp_path, hosts, *changes)
    # the second pass over the same rows
    assert len(one) == 12 and sum(one[6:]) < sum(one[:6]) - 0.3
    assert two == pytest.approx(one, abs=1e-3)
