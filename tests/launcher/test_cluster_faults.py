"""What goes wrong on clusters, made to happen on two real hosts: the message, the exit status, the
time it takes to tell, and that nothing is left running. Faults of single ranks are in
test_supervision.py, of hosts before a job in test_injected_faults.py, of files in test_cli.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import REPO, make_tiny_model
from grads_ds.launcher.hosts import Host, read_hostfile
from grads_ds.launcher.job_outcome import DONE
from grads_ds.launcher.job_status import snapshot
from tests.cluster import Cluster, cluster
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK, left_behind, run_code

pytestmark = pytest.mark.cluster
FOREVER = "heartbeat.beat('working'); time.sleep(600)"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


@pytest.fixture
def place(
    hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, object]]:
    """Both hosts by Open MPI, which starts fastest; everything of a test must have ended
    afterwards.
    """
    monkeypatch.setenv("PATH", hosts.environment["PATH"])
    monkeypatch.chdir(tmp_path)
    yield {"hosts": read_hostfile(hosts.hostfile), "backend": "openmpi"}
    assert left_behind(str(tmp_path)) == []


def once_running(tmp_path: Path, act: Callable[[], object], ranks: int = 2) -> None:
    """Call `act` as soon as every rank of the job has reported progress."""

    def wait() -> None:
        for _ in range(600):
            records = [
                json.loads(f.read_text() or "{}")
                for f in (tmp_path / "logs").glob("stage/*/rank*.json")
            ]
            if len(records) == ranks and all("progress" in record for record in records):
                act()
                return
            time.sleep(0.05)

    threading.Thread(target=wait, daemon=True).start()


def test_a_host_that_goes_down_in_the_middle(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_running(tmp_path, lambda: hosts.control("kill", "2"))
    try:
        began = time.monotonic()
        outcome = run_code(FOREVER, tmp_path, monkeypatch, **place)
        told(
            "a host that goes down in the middle",
            outcome.sentence,
            outcome.status,
            time.monotonic() - began,
        )
        assert (outcome.rank, outcome.host) == (1, hosts.host_names[1])
    finally:
        hosts.control("boot", "2")


def test_an_interrupt_reaches_every_host(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_running(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run_code(FOREVER, tmp_path, monkeypatch, **place)
    assert outcome.status == 143


def test_a_killed_launcher_leaves_nothing_on_any_host(
    hosts: Cluster, place: dict[str, object], tmp_path: Path
) -> None:
    """kill -9 of the launcher: the supervisors hear nothing more and end their ranks."""
    code = f"""
import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests")!r}]
from pathlib import Path
from dataclasses import replace
from grads_ds.launcher.hosts import read_hostfile
from grads_ds.launcher.job import Placement, run_job
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK
limits = replace(QUICK, lost=2.0)
place = Placement(read_hostfile({str(hosts.hostfile)!r}), "openmpi", limits=limits)
words = [sys.executable, "-c", "import time; time.sleep(600)", {str(tmp_path)!r}]
run_job("stage", words, place, Path("logs"))
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=hosts.environment)
    records: list[Path] = []
    for _ in range(300):
        time.sleep(0.1)
        records = [
            f
            for f in (tmp_path / "logs").glob("stage/*/rank*.json")
            if '"running"' in f.read_text()
        ]
        if len(records) == 2:
            break
    assert len(records) == 2
    launcher.kill()
    launcher.wait()
    assert left_behind(str(tmp_path), seconds=30) == []


def test_a_hang_names_the_ranks_that_are_elsewhere(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three ranks sleeps, the one on the other host is frozen and cannot even give its
    stack, the last waits for them.
    """
    code = """
import threading
ready = threading.Event()
def advance():  # a busy machine may take long to import torch, which is no hang
    while not ready.wait(0.6):
        heartbeat.beat("getting ready", None)
threading.Thread(target=advance, daemon=True).start()
import torch.distributed as dist
def lost_in_thought():
    time.sleep(600)
dist.init_process_group("gloo")
dist.barrier()
ready.set()
if rank == 1:
    lost_in_thought()
if rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
dist.barrier()
"""
    first, second = (host.name for host in place["hosts"])
    began = time.monotonic()
    outcome = run_code(
        code,
        tmp_path,
        monkeypatch,
        hosts=[Host(first, 2), Host(second, 1)],
        backend="openmpi",
        limits=replace(QUICK, hang=4.0),
    )
    seconds = time.monotonic() - began
    one, two = hosts.host_names
    assert f"rank 1 on {one} is in lost_in_thought" in outcome.sentence
    assert f"rank 0 on {one} is waiting in barrier" in outcome.sentence
    told("a rank that hangs", outcome.sentence, outcome.status, seconds)
    told("a rank that is frozen", outcome.sentence, outcome.status, seconds, bad=two, good=one)


WORK = """
from pathlib import Path
from grads_ds.distributed import ranks
ranks.start()
import torch, torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from grads_ds.config.load import load_config
from grads_ds.engine.frozen_pass import score_samples
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
scored = score_samples(
    config, config.model.path, rows, list(range(64)) * 2000, ["lm_head"], "mean", 384, "recording"
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
        pid = json.loads(next((tmp_path / "logs").glob("stage/*/rank00001.json")).read_text())[
            "pid"
        ]
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
    outcome = run_code(
        WORK, tmp_path, monkeypatch, **place | {"limits": replace(QUICK, straggler_window=2.0)}
    )
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


@pytest.mark.parametrize("backend", ["openmpi", "pdsh"])
def test_a_run_directory_that_one_host_does_not_share(
    backend: str,
    hosts: Cluster,
    place: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "logs").mkdir()
    subprocess.run(hosts.on(2, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "logs")), check=True)
    began = time.monotonic()
    try:
        outcome = run_code(FOREVER, tmp_path, monkeypatch, **place | {"backend": backend})
    finally:
        subprocess.run(hosts.on(2, "umount", str(tmp_path / "logs")), check=True)
    words = " ".join(f"{outcome.sentence} {outcome.error}".split())
    places = {"bad": hosts.addresses[1], "good": hosts.addresses[0]}
    told(
        "a run directory that one host does not share",
        words,
        outcome.status,
        time.monotonic() - began,
        **places,
    )
