"""Every backend starts every rank on its host, and the truth arrives whichever runner stood between."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import backends
from launcher.environment import for_runner
from launcher.hosts import Host, read_hostfile
from launcher.outcome import DONE, FAILED
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import folder_of, left_behind, run_code

ODD = "a 'b' \"c\"\n$HOME;touch x `id` \\ é"
MEET = (
    f"ODD = {ODD!r}"
    + """
import socket
import torch.distributed as dist
dist.init_process_group("gloo")
seen = [None] * world
dist.all_gather_object(seen, [rank, int(os.environ["LOCAL_RANK"]), socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")])
assert os.environ["ODD"] == ODD, os.environ["ODD"]
print("together", __import__("json").dumps(seen), flush=True)
dist.barrier(); dist.destroy_process_group()
"""
)
PROGRAM = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpiexec.hydra"}


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Cluster]:
    with cluster(2, 2) as hosts:
        yield hosts


@pytest.mark.cluster
@pytest.mark.parametrize("backend", PROGRAM)
def test_ranks_start_on_their_hosts_and_failures_come_back(
    backend: str, two_hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Unequal slots: three ranks on two hosts. Then one rank fails, and the runner's own status plays no part."""
    if not shutil.which(PROGRAM[backend]):
        pytest.skip(f"needs {PROGRAM[backend]}")
    monkeypatch.setenv("PATH", two_hosts.environment["PATH"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ODD", ODD)
    first, second = (host.name for host in read_hostfile(two_hosts.hostfile))
    place = {"hosts": [Host(first, 2), Host(second, 1)], "backend": backend}
    outcome = run_code(MEET, tmp_path, monkeypatch, **place)
    assert outcome.status == DONE, (outcome, (folder_of(tmp_path) / "runner.log").read_text())
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("together"))
    one, two = two_hosts.host_names
    assert json.loads(line.split(maxsplit=1)[1]) == [[0, 0, one, "eth0"], [1, 1, one, "eth0"], [2, 0, two, "eth0"]]
    failing = "if rank == 2:\n    heartbeat.failed('ValueError: mine', 1); os._exit(7)\ntime.sleep(600)"
    outcome = run_code(failing, tmp_path, monkeypatch, **place)
    assert (outcome.status, outcome.rank, outcome.host, outcome.error) == (FAILED, 2, two, "ValueError: mine")
    assert left_behind(str(tmp_path)) == [] and not list(tmp_path.rglob("x"))


def test_nothing_of_a_path_or_the_environment_reaches_a_remote_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a;touch x", "$(id)", "with space", "back`tick`"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert any("remote shell" in fault for fault in backends.load("pdsh").faults([Host("a", 1)]))
    assert not {"NCCL_SECRET", "PYTHONPATH"} & set(for_runner({"NCCL_SECRET": "x", "PYTHONPATH": "y", "PATH": "/bin"}))


@pytest.mark.parametrize("name", backends.NAMES)
def test_all_backends_have_one_signature(name: str, tmp_path: Path) -> None:
    job = backends.Job(tmp_path, [Host("localhost", 2)], {"PATH": "/bin"})
    commands = backends.load(name).commands(job)
    assert commands and all(str(tmp_path) in " ".join(command.arguments) for command in commands)
    assert all(isinstance(fault, str) for fault in backends.load(name).faults(job.hosts))
