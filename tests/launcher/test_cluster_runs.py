"""Probe and SFT on two hosts through `grads-ds run`, under every kind of runner: DeepSpeed over
pdsh, Open MPI, a real Slurm.

And with a host lost in the middle of SFT: started again on both hosts, or with --elastic on the one
that is left, it ends as the run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import REPO, make_tiny_model, write_rows
from tests import slurm
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import left_behind

# a run may be started twice
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 24
SECONDS = 280.0
GRADS_DS = [sys.executable, "-m", "grads_ds"]
ODD = "a 'b' \"c\"\n$HOME;touch x `id` \\ é"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


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
    return base | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


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
        *GRADS_DS,
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


@pytest.fixture(scope="module")
def calm(job: Path, hosts: Cluster) -> Ran:
    """The run that nobody disturbs, by Open MPI."""
    needs("mpirun")
    return run(job, hosts, "calm", "run", "--to", "sft", "--backend", "openmpi")


def test_probe_and_sft_on_two_hosts(job: Path, hosts: Cluster, calm: Ran) -> None:
    check(job / "calm", hosts)
    assert len(calm.losses) == 1 and sorted(calm.curve) == list(range(1, STEPS + 1))
    assert calm.curve[STEPS] < calm.curve[1] - 0.1  # it does train


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


def until_sft(job: Path, name: str) -> None:
    """A run directory of its own that is as the calm run was before SFT."""
    shutil.copytree(job / "calm", job / name)
    for made in ("sft", "tensorboard/sft", "logs/sft"):
        shutil.rmtree(job / name / made)
    (job / name / "state/sft.selected.json").unlink()


def kill_all_of(hosts: Cluster, host: int) -> int:
    """SIGKILL to every process that runs on a host, which is the job's alone, but for its sshd; how
    many there were.
    """
    listed = ["ip", "netns", "pids", hosts.host_names[host - 1]]
    killed = 0
    for pid in subprocess.run(
        listed, env=hosts.environment, capture_output=True, text=True
    ).stdout.split():
        lines = Path("/proc", pid, "status").read_text().splitlines()
        inside = next(line.split()[1:] for line in lines if line.startswith("NSpid"))
        if len(inside) > 1 and inside[-1] != "1":  # the others hold the host's process tree up
            os.kill(int(pid), signal.SIGKILL)
            killed += 1
    return killed


def test_kill_9_of_a_hosts_processes_in_sft_changes_nothing(
    job: Path, hosts: Cluster, calm: Ran
) -> None:
    """By pdsh: all processes of the second host killed in SFT, and started again."""
    needs("pdsh")
    until_sft(job, "killed")
    killed: list[int] = []
    words = ("run", "--to", "sft", "--backend", "pdsh", "--max-restarts", "1")
    again = run(job, hosts, "killed", *words, disturb=lambda: killed.append(kill_all_of(hosts, 2)))
    assert killed[0] >= 4  # of ssh and DeepSpeed's launcher, the supervisor, the rank
    assert (
        f"rank 1 on {hosts.host_names[1]} fell silent" in again.said
        and "restart 1 of 1" in again.said
    )
    assert hosts_of(again.jobs["sft"]) == [hosts.host_names] * 2 and hosts_of(
        again.jobs["probe"]
    ) == [hosts.host_names]
    assert len(again.losses) == 2 and min(again.losses[1]) > 4  # it went on from a checkpoint
    same(again, calm)


def test_elastic_sft_goes_on_with_the_host_that_is_left(
    job: Path, hosts: Cluster, calm: Ran
) -> None:
    """The host of rank 0 goes down for good: the last checkpoint of two ranks is rewritten for one,
    compared, and trained on.
    """
    until_sft(job, "elastic")
    words = ("sft", "--backend", "openmpi", "--max-restarts", "1", "--elastic")
    try:
        left = run(job, hosts, "elastic", *words, disturb=lambda: hosts.control("kill", "1"))
    finally:
        hosts.control("boot", "1")
    assert (
        f"left out: hosts: {hosts.addresses[0]}" in left.said
        and ": rewriting it for 1 rank\n" in left.said
    )
    assert hosts_of(left.jobs["sft"]) == [hosts.host_names, hosts.host_names[1:]]
    assert len(left.losses) == 2 and min(left.losses[1]) > 4
    same(left, calm)


def same(other: Ran, calm: Ran) -> None:
    """The losses and weights of the calm run, but for rounding.

    A step is two micro-batches: two ranks reduce a + b, one rank accumulates a + b, and float32's
    sum of two has one order only. What may differ is the gradient's norm, summed over other shards:
    2**-24 of it for each of a few additions, which Adam divides out again. So a few units in the
    last place of a loss of about 5 (5e-7 each), and of the weights' updates.
    """
    assert sorted(other.curve) == sorted(calm.curve)
    assert max(abs(other.curve[step] - calm.curve[step]) for step in calm.curve) < 2e-6
    assert all(
        np.abs(other.weights[name] - calm.weights[name]).max() < 1e-6 for name in calm.weights
    )


def test_probe_and_sft_as_a_slurm_batch_job(job: Path, hosts: Cluster) -> None:
    """Submitted from outside an allocation; the job finds its hosts in Slurm's environment and its
    status comes back.

    What the submitting shell holds arrives at every rank as it was, whatever characters it is made
    of.
    """
    (job / "spy").mkdir()
    (job / "spy/sitecustomize.py").write_text(
        f"import os\nif 'GRADS_DS_JOB_FOLDER' in os.environ:\n    open({str(job / 'spy')!r} + '/' +"
        " os.environ['RANK'], 'w').write(os.environ.get('ODD', 'nothing'))\n"
    )
    variables = environment(slurm.start(hosts)) | {
        "ODD": ODD,
        "PYTHONPATH": f"{REPO}:{job / 'spy'}",
    }
    call = [
        *GRADS_DS,
        "run",
        "config.yaml",
        "--set",
        "run_dir=slurm",
        "--set",
        "sft.epochs=1",
        "--to",
        "sft",
    ]
    call += [
        "--backend",
        "slurm",
        "--slurm",
        "nodes=2",
        "--slurm",
        'comment=it\'s "odd"; $(touch x) `touch x`',
        "--wait",
    ]
    done = subprocess.run(
        hosts.on(1, *call), cwd=job, env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    logs = "\n".join(file.read_text()[-3000:] for file in (job / "slurm/logs").glob("slurm-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    check(job / "slurm", hosts)
    assert [(job / "spy" / rank).read_text() for rank in "01"] == [ODD, ODD]
    assert left_behind(str(job)) == [] and not list(job.rglob("x"))
    strange = variables | {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "a;touch x",
        "SLURM_TASKS_PER_NODE": "1",
    }
    inside = hosts.on(1, *GRADS_DS, "probe", "config.yaml", "--dry-run")
    refused = subprocess.run(
        inside, cwd=job, env=strange, capture_output=True, text=True, timeout=60
    )
    assert (
        refused.returncode == 2 and "give --hosts" in refused.stderr and not list(job.rglob("x"))
    ), refused.stderr
    again = [*call, "--set", "sft.batch_size=7"]
    wrong = subprocess.run(
        hosts.on(1, *again), cwd=job, env=variables, capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr


def test_elastic_recording_goes_on_without_a_host_that_is_down(job: Path, hosts: Cluster) -> None:
    call = [
        *GRADS_DS,
        "run",
        "config.yaml",
        "--set",
        "run_dir=recorded",
        "--hosts",
        str(hosts.hostfile),
    ]
    call += ["--backend", "openmpi", "--to", "probe"]
    variables = environment(hosts.environment)

    def attempt(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*call, *words], cwd=job, env=variables, capture_output=True, text=True, timeout=200
        )

    hosts.control("kill", "2")
    try:
        refused = attempt()
        assert refused.returncode == 2 and hosts.addresses[1] in refused.stderr, refused.stderr
        done = attempt("--elastic")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert f"left out: hosts: {hosts.addresses[1]}" in done.stderr
        manifest = json.loads((job / "recorded/scores/manifest.json").read_text())
        assert manifest["hosts"] == hosts.host_names[:1]
    finally:
        hosts.control("boot", "2")
    assert left_behind(str(job)) == []
