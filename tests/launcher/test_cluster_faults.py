"""What goes wrong on clusters, made to happen on two real hosts: the message, the exit status, the
time it takes to tell, and that nothing is left running. Faults of single ranks are in
test_supervision.py, of hosts before a job in test_injected_faults.py and
test_unreachable_hosts.py, of files in test_cli.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.launcher.hosts import Host
from tests.cluster import Cluster
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK, left_behind, run_code

pytestmark = pytest.mark.cluster
FOREVER = "heartbeat.beat('working'); time.sleep(600)"


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


@pytest.mark.slow
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
from grads_ds.launcher.process_group import join
import torch.distributed as dist
def lost_in_thought():
    time.sleep(600)
join("gloo")
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
        forked=True,
    )
    seconds = time.monotonic() - began
    one, two = hosts.host_names
    assert f"rank 1 on {one} is in lost_in_thought" in outcome.sentence
    assert f"rank 0 on {one} is waiting in barrier" in outcome.sentence
    told("a rank that hangs", outcome.sentence, outcome.status, seconds)
    told("a rank that is frozen", outcome.sentence, outcome.status, seconds, bad=two, good=one)


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
        outcome = run_code(
            FOREVER, tmp_path, monkeypatch, forked=backend == "pdsh", **place | {"backend": backend}
        )
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
