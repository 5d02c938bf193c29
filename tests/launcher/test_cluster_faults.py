"""What goes wrong on clusters, made to happen on two real hosts: the message, the exit status, the time it takes to tell, and that
nothing is left running. Faults of single ranks are in test_supervision.py, of host facts in test_doctor.py, of files in test_cli.py."""

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

from conftest import REPO
from launcher.doctor import examine
from launcher.hosts import Host, read_hostfile
from launcher.job import Place
from launcher.outcome import FAILED, LOST, NOT_STARTED
from launcher.reach import unreachable
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import QUICK, left_behind, run_code

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


def ssh_that(folder: Path, options: str) -> str:
    """A PATH whose ssh has these options, for faults of keys and ports."""
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F /dev/null {options} "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    return f"{folder}/bin:{os.environ['PATH']}"


LAX = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
SSH_FAULTS = {
    "no key": (lambda c, t: f"{LAX} -o IdentityFile=/dev/null -o IdentitiesOnly=yes", "ssh-copy-id"),
    "an unknown host key": (lambda c, t: "-o StrictHostKeyChecking=yes -o UserKnownHostsFile=/dev/null", "connect once by hand"),
    "a changed host key": (lambda c, t: f"-o StrictHostKeyChecking=yes -o UserKnownHostsFile={other_key(c, t)}", "ssh-keygen -R"),
    "a wrong port": (lambda c, t: f"{LAX} -p 9", "no sshd answers"),
}  # fmt: skip


def other_key(hosts: Cluster, folder: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    known = folder / "known"
    known.write_text("".join(f"{address} {(folder / 'key.pub').read_text()}" for address in hosts.addresses))
    return known


@pytest.mark.parametrize("case", SSH_FAULTS)
def test_a_host_that_ssh_cannot_enter(
    case: str, hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, advice = SSH_FAULTS[case]
    monkeypatch.setenv("PATH", ssh_that(tmp_path, options(hosts, tmp_path)))
    began = time.monotonic()
    faults = unreachable(read_hostfile(hosts.hostfile))
    assert set(faults) == set(hosts.addresses) and all(advice in fault for fault in faults.values()), faults
    assert time.monotonic() - began < 12


def test_a_name_that_does_not_resolve_and_one_that_is_no_name() -> None:
    assert "does not resolve" in unreachable([Host("no-such-host.invalid", 1)])["no-such-host.invalid"]


def test_run_refuses_hosts_that_are_down_and_the_statuses_tell(
    hosts: Cluster, place: dict[str, object], tmp_path: Path
) -> None:
    """A cut network, then a host without processes: status 2 and the host's name, within seconds of ssh's own limit."""
    (tmp_path / "zero3.json").write_text("{}")
    config = {"run_dir": "run", "model": {"path": "a/b"}, "data": {"train": ["x"]}, "deepspeed": "zero3.json"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    call = [sys.executable, "-m", "grads_ds", "doctor", "config.yaml", "--hosts", str(hosts.hostfile)]
    for cut, mend in ((("link", "2", "down"), ("link", "2", "up")), (("kill", "2"), ("boot", "2"))):
        hosts.control(*cut)
        try:
            began = time.monotonic()
            environment = hosts.environment | {"PYTHONPATH": str(REPO), "COLUMNS": "300"}
            done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2, done.stderr
            assert f"{hosts.addresses[1]}: wanted to enter it" in done.stdout
            assert time.monotonic() - began < 20
        finally:
            hosts.control(*mend)


def test_a_host_that_goes_down_in_the_middle(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_running(tmp_path, lambda: hosts.control("kill", "2"))
    try:
        began = time.monotonic()
        outcome = run_code(FOREVER, tmp_path, monkeypatch, **place)
        assert (outcome.status, outcome.rank, outcome.host) == (LOST, 1, hosts.host_names[1])
        assert time.monotonic() - began < 40
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


def test_a_taken_port(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = subprocess.Popen(
        hosts.on(1, sys.executable, "-m", "http.server", "29511"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        time.sleep(1.0)
        outcome = run_code(FOREVER, tmp_path, monkeypatch, **place, ports=(29511, 29511))
        assert outcome.status == FAILED and "no free port from 29511 to 29511" in outcome.error
    finally:
        holder.kill()
        holder.wait()
        subprocess.run(hosts.on(1, "pkill", "-f", "http.server 29511"))  # inside the host's own process tree


def doctored(hosts: Cluster, folder: Path, *files: str) -> dict[str, str]:
    """What the doctor finds wrong: text by check, for faults."""
    place = Place(read_hostfile(hosts.hostfile), "openmpi")
    found = examine(place, folder / "run", files, wants_compiler=False)
    return {f"{item.check} @ {item.host}": f"{item.found} {item.advice}" for item in found if item.level == "fault"}


def test_the_doctor_finds_two_good_hosts_good(hosts: Cluster, place: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("weights")
    assert doctored(hosts, tmp_path, str(tmp_path / "model.bin")) == {}


def test_the_doctor_finds_a_model_missing_on_one_host(hosts: Cluster, place: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("weights")
    subprocess.run(hosts.on(2, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "model")), check=True)
    try:
        faults = doctored(hosts, tmp_path, str(tmp_path / "model"))
    finally:
        subprocess.run(hosts.on(2, "umount", str(tmp_path / "model")), check=True)
    assert list(faults) == [f"files @ {hosts.addresses[1]}"]


def test_the_doctor_finds_a_one_way_street(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall's work: host 2 cannot open connections to host 1, though host 1 and this machine can to host 2."""
    monkeypatch.setattr("launcher.doctor.LIMITS", replace(QUICK, hang=12.0))
    rule = ["blackhole", f"{hosts.addresses[0]}/32"]
    subprocess.run(hosts.on(2, "ip", "route", "add", *rule), check=True)
    try:
        began = time.monotonic()
        faults = doctored(hosts, tmp_path)
        assert time.monotonic() - began < 60
    finally:
        subprocess.run(hosts.on(2, "ip", "route", "del", *rule), check=True)
    assert any(name.startswith("way to") for name in faults), faults


def test_the_doctor_finds_a_wrong_interface(
    hosts: Cluster, place: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own choice stands, and when it leads nowhere the collectives say so, within the limit."""
    monkeypatch.setattr("launcher.doctor.LIMITS", replace(QUICK, hang=15.0))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    faults = doctored(hosts, tmp_path)
    assert any(name.startswith("start") for name in faults), faults
    assert left_behind(str(tmp_path)) == []
