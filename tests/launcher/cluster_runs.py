"""One config on two hosts, run under one runner or another, and what it left."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import make_tiny_model, write_rows
from tests import forked_ranks
from tests.cluster import Cluster
from tests.launcher.jobs import left_behind

STEPS = 24


SECONDS = 280.0


GRADS_DS = [sys.executable, "-m", "grads_ds"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config whose probe and SFT take seconds; every test has a run directory of
    its own in it.
    """
    folder = tmp_path_factory.mktemp("job")
    make_tiny_model(folder / "model")
    write_rows(folder / "pool.jsonl", 32)
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    training = {
        "learning_rate": 1e-3,
        "batch_size": 8,
        "micro_batch_size": 4,
        "checkpoint_steps": 4,
    }
    config = {
        "run_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "deepspeed": "zero3.json",
        "data": {"train": ["pool.jsonl"], "max_length": 64},
        "probe": {"epochs": 0, "tokens_per_microbatch": 512},
        "select": {"budget": 1.0},
        "sft": {"epochs": STEPS / 4} | training,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def environment(base: dict[str, str]) -> dict[str, str]:
    return base | {
        "PYTHONPATH": forked_ranks.python_path(),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


@dataclass
class Ran:
    """One run: what it said, its stages' jobs as lists of the ranks' records, SFT's losses by step
    and attempt, its weights.
    """

    said: str
    jobs: dict[str, list[list[dict[str, object]]]]
    losses: list[dict[int, float]]
    weights: dict[str, np.ndarray]

    @property
    def curve(self) -> dict[int, float]:
        """Loss by step, the last recording where a step was trained twice."""
        return {step: loss for attempt in self.losses for step, loss in attempt.items()}


def run(
    job: Path, hosts: Cluster, name: str, *words: str, disturb: Callable[[], object] | None = None
) -> Ran:
    """`grads-ds WORDS` on the hosts until it ends well; `disturb` is called once SFT has a finished
    checkpoint.
    """
    folder = job / name
    call = [
        forked_ranks.interpreter(),
        *GRADS_DS[1:],
        words[0],
        "config.yaml",
        "--set",
        f"run_dir={name}",
        "--hosts",
        str(hosts.hostfile),
        *words[1:],
    ]
    process = subprocess.Popen(
        call,
        cwd=job,
        env=environment(hosts.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + SECONDS
    while disturb and not list(folder.glob("sft/checkpoints/checkpoint-*/complete")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][
            -3000:
        ]
        time.sleep(0.05)
    if disturb:
        disturb()
    said = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, said[-3000:]
    assert left_behind(str(job)) == []
    jobs = {
        stage: [
            [json.loads(f.read_text()) for f in sorted(one.glob("rank*.json"))]
            for one in sorted(logs.iterdir())
        ]
        for stage in ("probe", "sft")
        if (logs := folder / "logs" / stage).is_dir()
    }
    attempts = []
    for file in sorted((folder / "tensorboard/sft/selected").glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        attempts.append({event.step: event.value for event in events.Scalars("train/loss")})
    return Ran(said, jobs, attempts, load_file(folder / "sft/model/model.safetensors"))


def hosts_of(jobs: list[list[dict[str, object]]]) -> list[list[object]]:
    return [[record["host"] for record in ranks] for ranks in jobs]


def needs(program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"needs {program} (scripts/install.sh --dev)")


def check(folder: Path, hosts: Cluster) -> None:
    assert json.loads((folder / "scores/manifest.json").read_text())["hosts"] == hosts.host_names
    assert (folder / "sft/model/model.safetensors").is_file()
    for stage in ("probe", "sft"):
        records = [
            json.loads(file.read_text())
            for file in sorted((folder / "logs" / stage).glob("*/rank*.json"))
        ]
        assert [(r["host"], r["state"], r["status"]) for r in records] == [
            (h, "done", 0) for h in hosts.host_names
        ]
