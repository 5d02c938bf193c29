"""Every backend starts every rank on its host, and the truth arrives whichever runner stood
between.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from grads_ds.cli import main
from grads_ds.launcher import backends
from grads_ds.launcher.environment import for_runner
from grads_ds.launcher.hosts import Host, read_hostfile
from grads_ds.launcher.job_outcome import DONE, FAILED
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import left_behind, run_code

ODD = "a 'b' \"c\"\n$HOME;touch x `id` \\ é"
MEET = (
    f"ODD = {ODD!r}"
    + """
import socket
from grads_ds.launcher.process_group import join
import torch.distributed as dist
join("gloo")
seen = [None] * world
interface = os.environ.get("GLOO_SOCKET_IFNAME")
dist.all_gather_object(
    seen, [rank, int(os.environ["LOCAL_RANK"]), socket.gethostname(), interface]
)
assert os.environ["ODD"] == ODD, os.environ["ODD"]
print("together", __import__("json").dumps(seen), flush=True)
dist.barrier(); dist.destroy_process_group()
"""
)
FAIL = """
if rank == 2:
    heartbeat.failed("ValueError: mine", 1)
    os._exit(7)
time.sleep(600)
"""
RUN_TO_THE_END = ("pdsh", "openmpi")  # in test_cluster_runs.py
PROGRAM = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpiexec.hydra"}


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Cluster]:
    with cluster(2, 2) as hosts:
        yield hosts


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("backend", PROGRAM)
def test_ranks_start_on_their_hosts_and_failures_come_back(
    backend: str,
    two_hosts: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Unequal slots: three ranks on two hosts meet.

    Then one fails, and the runner's own status plays no part. Under DeepSpeed's launcher every
    process is of its own interpreter.
    """
    if not shutil.which(PROGRAM[backend]):
        pytest.skip(f"needs {PROGRAM[backend]}")
    monkeypatch.setenv("PATH", two_hosts.environment["PATH"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ODD", ODD)
    first, second = (host.name for host in read_hostfile(two_hosts.hostfile))
    place = {"hosts": [Host(first, 2), Host(second, 1)], "backend": backend}
    if backend not in RUN_TO_THE_END:
        assert run_code("pass", tmp_path, monkeypatch, **place).status == DONE
    forked = backend != "pdsh"
    outcome = run_code(MEET + FAIL, tmp_path, monkeypatch, forked=forked, **place)
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("together"))
    one, two = two_hosts.host_names
    assert json.loads(line.split(maxsplit=1)[1]) == [
        [0, 0, one, "eth0"],
        [1, 1, one, "eth0"],
        [2, 0, two, "eth0"],
    ]
    assert (outcome.status, outcome.rank, outcome.host, outcome.error) == (
        FAILED,
        2,
        two,
        "ValueError: mine",
    )
    assert left_behind(str(tmp_path)) == [] and not list(tmp_path.rglob("x"))


def test_nothing_of_a_path_or_the_environment_reaches_a_remote_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a;touch x", "$(id)", "with space", "back`tick`"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert any(
            "remote shell" in problem for problem in backends.load("pdsh").problems([Host("a", 1)])
        )
    assert not {"NCCL_SECRET", "PYTHONPATH"} & set(
        for_runner({"NCCL_SECRET": "x", "PYTHONPATH": "y", "PATH": "/bin"})
    )


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_host_name_with_shell_text_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text(
        "a;touch${IFS}x slots=1\n$(touch${IFS}x) slots=1\n`touch${IFS}x` slots=1\ngood slots=1\n"
    )
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run",
        "model": {"path": "m"},
        "deepspeed": "zero3.json",
        "data": {"train": ["p"]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    words = ["probe", "config.yaml", "--hosts", "hosts", "--backend", name]
    if name == "slurm":
        # outside an allocation Slurm chooses the hosts
        assert main([*words, "--slurm", "nodes=1"]) == 2
        assert "leave --hosts out" in capsys.readouterr().err
        monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert main(words) == 2
    told = capsys.readouterr().err
    assert (
        told.count("is not a host name") == 3
        and not (tmp_path / "x").exists()
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("name", backends.NAMES)
def test_all_backends_have_one_signature(name: str, tmp_path: Path) -> None:
    job = backends.Job(tmp_path, [Host("localhost", 2)], {"PATH": "/bin"})
    commands = backends.load(name).commands(job)
    assert commands and all(str(tmp_path) in " ".join(command.arguments) for command in commands)
    assert all(isinstance(problem, str) for problem in backends.load(name).problems(job.hosts))
