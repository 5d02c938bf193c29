"""Probe and SFT on two hosts through `grads-ds run`, under every kind of runner: DeepSpeed over pdsh, Open MPI, a real Slurm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import REPO, make_tiny_model, write_rows
from tests import slurm
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import left_behind

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a config whose probe and SFT take seconds."""
    make_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "pool.jsonl", 24)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    training = {"learning_rate": 1e-2, "batch_size": 8, "micro_batch_size": 4}
    config = {
        "run_dir": "run", "model": {"path": "model", "dtype": "float32"}, "deepspeed": "zero3.json",
        "data": {"train": ["pool.jsonl"], "max_length": 64}, "probe": {"epochs": 0, "tokens_per_microbatch": 512},
        "select": {"budget": 0.5}, "sft": {"epochs": 1} | training,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def check(job: Path, hosts: Cluster, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((job / "run/scores/manifest.json").read_text())["hosts"] == hosts.host_names
    assert (job / "run/sft/model/model.safetensors").is_file()
    for stage in ("probe", "sft"):
        records = [json.loads(file.read_text()) for file in sorted((job / "run/logs" / stage).glob("*/rank*.json"))]
        assert [(r["host"], r["state"], r["status"]) for r in records] == [(h, "done", 0) for h in hosts.host_names]
    assert left_behind(str(job)) == []


def environment(base: dict[str, str]) -> dict[str, str]:
    return base | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize("backend, program", [("pdsh", "pdsh"), ("openmpi", "mpirun")])
def test_probe_and_sft_from_a_hostfile(backend: str, program: str, hosts: Cluster, job: Path) -> None:
    if not shutil.which(program):
        pytest.skip(f"needs {program} (scripts/install.sh --dev)")
    command = [sys.executable, "-m", "grads_ds", "run", "config.yaml", "--to", "sft", "--hosts", str(hosts.hostfile)]
    done = subprocess.run(
        [*command, "--backend", backend], cwd=job, env=environment(hosts.environment), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    check(job, hosts, done)


def test_probe_and_sft_as_a_slurm_batch_job(hosts: Cluster, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitted from outside an allocation; the job finds its hosts in Slurm's environment and its status comes back."""
    variables = environment(slurm.start(hosts))
    monkeypatch.chdir(job)
    call = [
        sys.executable,
        "-m",
        "grads_ds",
        "run",
        "config.yaml",
        "--to",
        "sft",
        "--backend",
        "slurm",
        "--slurm",
        "nodes=2",
        "--wait",
    ]
    done = subprocess.run(hosts.on(1, *call), cwd=job, env=variables, capture_output=True, text=True, timeout=280)
    logs = "\n".join(file.read_text()[-3000:] for file in (job / "run/logs").glob("slurm-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    check(job, hosts, done)
    again = [*call, "--set", "sft.batch_size=7"]
    wrong = subprocess.run(hosts.on(1, *again), cwd=job, env=variables, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr


def test_elastic_recording_goes_on_without_a_host_that_is_down(hosts: Cluster, job: Path) -> None:
    call = [
        sys.executable,
        "-m",
        "grads_ds",
        "run",
        "config.yaml",
        "--hosts",
        str(hosts.hostfile),
        "--backend",
        "openmpi",
    ]
    variables = environment(hosts.environment)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*call, *words], cwd=job, env=variables, capture_output=True, text=True, timeout=200)

    hosts.control("kill", "2")
    try:
        refused = run("--to", "probe")
        assert refused.returncode == 2 and hosts.addresses[1] in refused.stderr, refused.stderr
        done = run("--to", "probe", "--elastic")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert f"left out: hosts: {hosts.addresses[1]}" in done.stderr
        manifest = json.loads((job / "run/scores/manifest.json").read_text())
        assert manifest["hosts"] == hosts.host_names[:1]
    finally:
        hosts.control("boot", "2")
    assert left_behind(str(job)) == []
