"""The probe over several hosts, started by DeepSpeed's own launchers in an unmodified environment:
one table, whoever started it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster import Cluster, cluster
from conftest import REPO, make_tiny_model, write_rows
from grads_ds.config.load import load_config
from ranks import run_on_ranks
from tests import forked_ranks
from tests.probe.jobs import stage

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
ROWS = 40
# what the tests themselves set
OURS = (
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",
    "PYTHONPATH",
)


@pytest.fixture(scope="module")
def four() -> Iterator[Cluster]:
    with cluster(4) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared pool, and the table one process made of it (`one.parquet`)."""
    folder = tmp_path_factory.mktemp("hosts")
    make_tiny_model(folder / "model")
    write_rows(folder / "pool.jsonl", ROWS)
    (folder / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    config = {
        "run_dir": "run",
        "deepspeed": "zero3.json",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["pool.jsonl"], "max_length": 64},
        "probe": {"epochs": 0, "tokens_per_microbatch": 256},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run_on_ranks(1, prepare_and_probe, folder)
    shutil.copy(folder / "run/scores/table.parquet", folder / "one.parquet")
    return folder


def prepare_and_probe(folder: Path) -> None:
    os.chdir(folder)
    config = load_config("config.yaml")
    for name in ("prepare", "probe"):
        stage(name, config)


def call(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run without any variable that the tests set, `variables` apart; the working folder alone
    leads to this source tree.
    """
    link = folder / "grads_ds"
    # a checkout that is not installed is found in the folder the job starts in
    if not link.exists():
        link.symlink_to(REPO / "grads_ds")
        (folder / "launcher").symlink_to(REPO / "launcher")
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def forget_scores(folder: Path) -> None:
    shutil.rmtree(folder / "run/scores", ignore_errors=True)
    (folder / "run/lock.json").unlink(missing_ok=True)  # of a job that was killed
    for record in (folder / "run/state").glob("probe*"):
        record.unlink()


def deepspeed(
    hosts: Cluster, count: int, folder: Path, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    lines = hosts.hostfile.read_text().splitlines(keepends=True)[:count]
    (folder / "hostfile").write_text("".join(lines))
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    if variables:  # what that script runs, in the form in which it is forked
        command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    words = ["--hostfile", "hostfile", *options, "--module", "grads_ds", "probe", "config.yaml"]
    return call(hosts.on(1, *command, *words), folder, **variables)


def forked() -> dict[str, str]:
    """The variables under which ranks are forked, with what they find of the tests' own."""
    return {name: os.environ[name] for name in OURS if name in os.environ} | {
        "PYTHONPATH": forked_ranks.python_path()
    }


def same(one: pa.Table, other: pa.Table) -> bool:
    assert one.schema.names == other.schema.names
    for name in one.schema.names:
        a, b = one[name], other[name]
        if pa.types.is_floating(a.type):
            np.testing.assert_allclose(b.to_numpy(), a.to_numpy(), rtol=1e-5)
        else:
            assert a.equals(b), name
    return True


@pytest.mark.parametrize(
    "count, launcher",
    # on more hosts the same commands start the same ranks
    [
        (2, "pdsh"),
        (2, "openmpi"),
        pytest.param(4, "pdsh", marks=pytest.mark.long),
        pytest.param(4, "openmpi", marks=pytest.mark.long),
    ],
)
def test_every_launcher_gives_the_table_of_one_process(
    four: Cluster, job: Path, count: int, launcher: str
) -> None:
    if launcher == "openmpi":
        pytest.importorskip("mpi4py")
    if not shutil.which("mpirun" if launcher == "openmpi" else launcher):
        pytest.skip(f"needs {launcher} (scripts/install.sh --dev)")
    forget_scores(job)
    options = (
        ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]
        if launcher == "openmpi"
        else []
    )
    done = deepspeed(four, count, job, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert same(pq.read_table(job / "one.parquet"), pq.read_table(job / "run/scores/table.parquet"))
    manifest = json.loads((job / "run/scores/manifest.json").read_text())
    assert manifest["hosts"] == four.host_names[:count] and manifest["world_size"] == count
    assert manifest["reduced_by"] == ("mpi4py" if launcher == "openmpi" else "torch.distributed")


def test_a_shell_with_the_rank_of_another_job_is_refused(
    four: Cluster, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mpirun hands them to the first host alone, whose rank would run by itself while the others
    wait in MPI without end.
    """
    pytest.importorskip("mpi4py")
    if not shutil.which("mpirun"):
        pytest.skip("needs mpirun (scripts/install.sh --dev)")
    forget_scores(job)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    options = ["--launcher", "openmpi", "--launcher_args=--allow-run-as-root"]
    done = deepspeed(four, 2, job, *options, **forked())
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-3000:]
    assert (
        "WORLD_SIZE: wanted 2, as mpirun says; found 1 in the shell that called mpirun; unset"
        " WORLD_SIZE" in said
    )
    assert not (job / "run/scores").exists()


def test_a_host_with_another_model_stops_the_job_and_is_named(four: Cluster, job: Path) -> None:
    forget_scores(job)
    other = make_tiny_model(job / "other", tied=False)
    # host 2 alone sees the other model where the config says
    subprocess.run(four.on(2, "mount", "--bind", str(other), str(job / "model")), check=True)
    try:
        done = deepspeed(four, 2, job, **forked())
    finally:
        subprocess.run(four.on(2, "umount", str(job / "model")), check=True)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-3000:]
    assert f"{four.host_names[1]}: model" in said and f"as on {four.host_names[0]}; found" in said
    assert "data" not in [
        line.split(": ")[-1].split()[0] for line in said.splitlines() if four.host_names[1] in line
    ]
    assert not (job / "run/scores").exists()


def test_a_second_probe_is_refused_and_told_who_holds_the_run(four: Cluster, job: Path) -> None:
    forget_scores(job)
    hold = (
        "import time; from pathlib import Path; from grads_ds.run_dir.lock import lock\n"
        "with lock(Path('run'), 'grads-ds probe'): Path('held').touch(); time.sleep(60)"
    )
    holder = subprocess.Popen(four.on(2, sys.executable, "-c", hold), cwd=job)
    try:
        deadline = time.monotonic() + 30
        while not (job / "held").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        done = call(
            four.on(1, sys.executable, "-m", "grads_ds", "probe", "config.yaml", "--ranks", "1"),
            job,
        )
    finally:
        holder.kill()
        holder.wait()
        (job / "run/lock.json").unlink()
    assert done.returncode == 2
    assert (
        "in use by grads-ds probe (pid " in done.stderr
        and f"on {four.host_names[1]}, since" in done.stderr
    )
