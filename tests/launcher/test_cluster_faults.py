"""What goes wrong on clusters, made to happen on two real hosts: the message, the exit status, the time it takes to tell, and that
nothing is left running. Faults of single ranks are in test_supervision.py, of hosts before a job in
test_injected_faults.py, of files in test_cli.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import REPO
from launcher.hosts import read_hostfile
from launcher.outcome import NOT_STARTED
from tests.cluster import Cluster, cluster
from tests.launcher.faults import told
from tests.launcher.jobs import left_behind, run_code

pytestmark = pytest.mark.cluster
FOREVER = "heartbeat.beat('working'); time.sleep(600)"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


@pytest.fixture
def place(hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Both hosts by Open MPI, which starts fastest; everything of a test must have ended afterwards."""
    monkeypatch.setenv("PATH", hosts.environment["PATH"])
    monkeypatch.chdir(tmp_path)
    return {"hosts": read_hostfile(hosts.hostfile), "backend": "openmpi"}


def once_running(tmp_path: Path, act: Callable[[], object], ranks: int = 2) -> None:
    """Call `act` as soon as every rank of the job has reported progress."""

    def wait() -> None:
        for _ in range(600):
            records = [json.loads(f.read_text() or "{}") for f in (tmp_path / "logs").glob("stage/*/rank*.json")]
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
        told("a host that goes down in the middle", outcome.sentence, outcome.status, time.monotonic() - began)
        assert (outcome.rank, outcome.host) == (1, hosts.host_names[1])
    finally:
        hosts.control("boot", "2")
    assert left_behind(str(tmp_path)) == []


def test_an_interrupt_reaches_every_host(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_running(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    outcome = run_code(FOREVER, tmp_path, monkeypatch, **place)
    assert outcome.status == 143
    assert left_behind(str(tmp_path)) == []


def test_a_killed_launcher_leaves_nothing_on_any_host(hosts: Cluster, place: dict[str, object], tmp_path: Path) -> None:
    """kill -9 of the launcher: the supervisors hear nothing more and end their ranks."""
    code = f"""
import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests")!r}]
from pathlib import Path
from dataclasses import replace
from launcher.hosts import read_hostfile
from launcher.job import Place, run_job
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK
place = Place(read_hostfile({str(hosts.hostfile)!r}), "openmpi", limits=replace(QUICK, lost=2.0))
run_job("stage", [sys.executable, "-c", "import time; time.sleep(600)", {str(tmp_path)!r}], place, Path("logs"))
"""
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=hosts.environment)
    records: list[Path] = []
    for _ in range(300):
        time.sleep(0.1)
        records = [f for f in (tmp_path / "logs").glob("stage/*/rank*.json") if '"running"' in f.read_text()]
        if len(records) == 2:
            break
    assert len(records) == 2
    launcher.kill()
    launcher.wait()
    assert left_behind(str(tmp_path), seconds=30) == []


@pytest.mark.parametrize("backend", ["openmpi", "pdsh"])
def test_a_run_directory_that_one_host_does_not_share(
    backend: str, hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    subprocess.run(hosts.on(2, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "logs")), check=True)
    try:
        outcome = run_code(FOREVER, tmp_path, monkeypatch, **place | {"backend": backend})
    finally:
        subprocess.run(hosts.on(2, "umount", str(tmp_path / "logs")), check=True)
    assert outcome.status == NOT_STARTED and hosts.addresses[1] in outcome.sentence
    assert "put run_dir on one" in outcome.error
    assert left_behind(str(tmp_path)) == []
