"""A rank that is slow to record or to train is named, by host, while the job goes on."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import make_tiny_model
from grads_ds.launcher.job_outcome import DONE
from grads_ds.launcher.job_status import snapshot
from tests.cluster import Cluster
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK, run_code

pytestmark = pytest.mark.cluster


WORK = """
from pathlib import Path
from grads_ds.distributed import ranks
ranks.start()
Path(f"pid{rank}").write_text(str(os.getpid()))
import numpy as np, torch, torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from grads_ds.config.load import load_config
from grads_ds.data.batches import plan_batches
from grads_ds.engine.frozen_pass import score_plan
from grads_ds.training.train import TrainingJob, train_model

def over(file):  # all ranks at the same step
    seen = torch.tensor(float(os.path.exists(file)))
    dist.all_reduce(seen)
    return seen > 0

class UntilTold(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = over("trained")

config = load_config("config.yaml", [])
ids = [[7 + (row * 31 + place * 17) % 250 for place in range(96)] for row in range(64)]
rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
lengths = np.full(64 * 2000, 96)
plan = plan_batches(lengths, ranks.world(), 384, config.seed)
many = rows.select(list(range(64)) * 2000)
scored = score_plan(
    config, config.model.path, many, plan, lengths, ["lm_head"], "mean", "recording"
)
while not over("recorded"):
    next(scored)
scored.close()
train_model(TrainingJob(
    config, config.sft, rows, config.model.path, Path("m"), Path("w"), Path("tb"), 100000,
    what="training", callbacks=[UntilTold()], identity="test"))
ranks.finish()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slow_rank_is_named_while_it_records_and_while_it_trains(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is stopped most of the time, as on a host with a busy neighbour: ZeRO-3 goes on,
    in lockstep with it.
    """
    # for its tokenizer; the work of one so small would be lost in the steps' overhead
    make_tiny_model(tmp_path / "model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    config = {
        "run_dir": ".",
        "model": {"path": "model", "dtype": "float32"},
        "deepspeed": "zero3.json",
        "data": {"train": ["none.jsonl"]},
        "sft": {"batch_size": 8, "micro_batch_size": 4, "checkpoint_steps": 100000},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    log, calm = tmp_path / "logs/stage.log", tmp_path / "calm"
    slow, no_more = (f"rank 1 on {hosts.host_names[1]} is slow{end}" for end in (": ", " no more"))
    # by what was worked on: what was told, after how many seconds, what status said
    seen: dict[str, tuple[str, float, str]] = {}

    def slow_down(doing: str, enough: str) -> None:
        """Once both ranks have been measured, stop rank 1 in bursts until it is named; go on when
        it keeps up again.
        """

        def measured() -> bool:
            found = [
                json.loads(file.read_text() or "{}")
                for file in (tmp_path / "logs").glob("stage/*/rank*.json")
            ]
            return bool(found) and all(
                record.get("progress", {}).get("doing") == doing and len(record["pace"]) == 2
                for record in found
            )

        until(measured)
        # a busy machine may be unfair for a while
        until(lambda: log.read_text().count(slow) == log.read_text().count(no_more))
        already, began = len(log.read_text()), time.monotonic()
        pid = (tmp_path / "pid1").read_text()
        calm.unlink(missing_ok=True)
        bursts = (
            f"while [ ! -e {calm} ] && kill -STOP {pid}; do sleep 0.18; kill -CONT {pid}; sleep"
            " 0.03; done"
        )
        slower = subprocess.Popen(hosts.on(2, "sh", "-c", bursts))
        until(lambda: slow in log.read_text()[already:])
        seconds = time.monotonic() - began
        job = snapshot(tmp_path)["job"]
        calm.touch()
        slower.wait()
        seen[doing] = (
            log.read_text()[already:],
            seconds,
            "; ".join(one["sentence"] for one in job["slow"]),
        )
        until(lambda: doing == "training" or no_more in log.read_text()[already:])
        (tmp_path / enough).touch()

    def both() -> None:
        slow_down("recording", "recorded")
        slow_down("training", "trained")

    threading.Thread(target=both, daemon=True).start()
    patient = {"limits": replace(QUICK, straggler_window=2.0), "forked": True}
    outcome = run_code(WORK, tmp_path, monkeypatch, **place | patient)
    assert outcome.status == DONE, (outcome, seen)
    events = [
        json.loads(line) for line in (tmp_path / "logs/events.jsonl").read_text().splitlines()
    ]
    named = [(event["event"], event["host"]) for event in events if event.get("rank") == 1]
    faults = {
        "recording": "a rank that is slow to record",
        "training": "a rank that is slow to train",
    }
    for doing, (said, seconds, status) in seen.items():
        assert slow in status
        told(
            faults[doing],
            said,
            outcome.status,
            seconds,
            bad=hosts.host_names[1],
            good=hosts.host_names[0],
        )
    assert named[:3] == [(event, hosts.host_names[1]) for event in ("slow", "slow no more", "slow")]


def until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.1)
