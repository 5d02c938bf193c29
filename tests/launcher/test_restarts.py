"""Killed in the middle of SFT, started again by --max-restarts: the losses are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import REPO, make_tiny_model, write_rows
from tests.launcher.jobs import left_behind

pytestmark = pytest.mark.slow
STEPS = 40


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, the last recording of a step where it was trained twice."""
    curve: dict[int, float] = {}
    for file in sorted(folder.glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        tag = next(tag for tag in events.Tags()["scalars"] if tag.endswith("loss") and "eval" not in tag)
        curve |= {event.step: event.value for event in events.Scalars(tag)}
    return curve


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "pool.jsonl", 32)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run", "model": {"path": "model", "dtype": "float32"}, "deepspeed": "zero3.json",
        "data": {"train": ["pool.jsonl"], "max_length": 64}, "probe": {"epochs": 0, "tokens_per_microbatch": 512},
        "select": {"budget": 1.0},
        "sft": {"epochs": STEPS / 4, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "checkpoint_steps": 4},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    call = [sys.executable, "-m", "grads_ds", "run", "config.yaml", "--ranks", "2", "--to"]

    def run(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*call, *words], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    calm = run("sft")
    assert calm.wait(timeout=250) == 0, calm.communicate()[0][-3000:]
    undisturbed, weights = (
        losses(tmp_path / "run/tensorboard/sft/selected"),
        load_file(tmp_path / "run/sft/model/model.safetensors"),
    )
    for name in ("sft", "tensorboard/sft", "logs/sft", "state/sft.selected.json"):
        (tmp_path / "run" / name).rename(tmp_path / f"calm.{name.replace('/', '.')}")
    disturbed = run("sft", "--max-restarts", "1")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run/sft/checkpoints").glob("checkpoint-*/complete")):
        assert disturbed.poll() is None and time.monotonic() < deadline, disturbed.communicate()[0][-3000:]
        time.sleep(0.05)
    records = [json.loads(file.read_text()) for file in (tmp_path / "run/logs/sft").glob("*/rank*.json")]
    for record in records:  # everything of the job on this host at once, as when it loses power
        os.kill(record["supervisor"], signal.SIGKILL)
    assert disturbed.wait(timeout=250) == 0, disturbed.communicate()[0][-3000:]
    told = disturbed.communicate()[0]
    assert "fell silent" in told and "restart 1 of 1" in told
    assert len(list((tmp_path / "run/logs/sft").glob("*/job.json"))) == 2
    resumed = losses(tmp_path / "run/tensorboard/sft/selected")
    assert sorted(resumed) == sorted(undisturbed) and len(resumed) >= STEPS // 2
    assert max(abs(resumed[step] - undisturbed[step]) for step in undisturbed) < 1e-4
    after = load_file(tmp_path / "run/sft/model/model.safetensors")
    assert all(np.allclose(after[name], weights[name], atol=1e-5) for name in weights)
    assert left_behind(str(tmp_path)) == []
