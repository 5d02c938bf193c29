"""Faults of hosts, made to happen on two real hosts before anything runs: `grads-ds doctor` (and
`run`) tell each of them, with its status, within seconds. Independent ones are made to happen
together. Faults while a job runs are in test_cluster_faults.py.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from conftest import REPO
from tests.cluster import Cluster
from tests.launcher import doctor_cluster
from tests.launcher.doctor_cluster import OTHER_PYTHON, examined, mounted, named
from tests.launcher.faults import told

hosts, job, small_disk = doctor_cluster.hosts, doctor_cluster.job, doctor_cluster.small_disk
pytestmark = pytest.mark.cluster


def test_two_good_hosts_are_good(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single port is enough, for the way between the hosts and for the collective."""
    found, status, _ = examined(capsys, hosts.hostfile, "--ports", "29512-29512")
    assert status == 0 and "PROBLEM" not in found


def test_hosts_that_differ(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dozen faults of the second host and of the link at once: none hides another."""
    there = job / "there"
    there.mkdir()
    packages = Path(sysconfig.get_paths()["purelib"])
    metadata = next(packages.glob("peft-*.dist-info/METADATA"))
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    source = REPO / "grads_ds/__init__.py"
    (there / "init.py").write_text(source.read_text() + "# another commit\n")
    (there / "held.jsonl").write_text((job / "held.jsonl").read_text().replace("sky", "sea", 1))
    (there / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {hosts.host_names[1]}\n")
    clock = next(packages.glob("*.pth"))
    (there / "clock.pth").write_text(
        f"{clock.read_text().rstrip()}\nimport time; time.ahead = getattr(time, 'ahead', lambda"
        " real=time.time: real() + 90); time.time = time.ahead\n"
    )
    gpu = "NVIDIA A100, 550, 81920"
    smi = hosts.hostfile.parent / "bin/nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\necho "{gpu}"\n[ "$(hostname)" = {hosts.host_names[1]} ] || echo'
        f' "{gpu.replace("550", "555")}"\n'
    )
    smi.chmod(0o755)
    compiler = Path(shutil.which("g++") or "/usr/bin/g++").resolve()
    mounts: list[tuple[str | Path, str | Path]] = [
        (there / "METADATA", metadata),
        (there / "init.py", source),
        ("tmpfs", job / "model"),
        ("/proc/1/mem", job / "pool.jsonl"),
        (there / "held.jsonl", job / "held.jsonl"),
        (there / "hosts", "/etc/hosts"),
        (there / "clock.pth", clock),
        ("tmpfs,size=64m", "/dev/shm"),
        ("/dev/null", compiler),
    ]
    if OTHER_PYTHON:
        mounts.append((OTHER_PYTHON, Path(sys.executable).resolve()))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(there))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    limits = ("prlimit", "--pid", "1")
    before = subprocess.run(
        hosts.on(2, *limits, "--nofile", "--memlock", "--noheadings", "-o", "SOFT,HARD"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    try:
        with mounted(hosts, *mounts):
            subprocess.run(hosts.on(2, *limits, "--nofile=512:", "--memlock=65536:"), check=True)
            hosts.control("--rate", "100mbit", "shape")
            found, status, seconds = examined(
                capsys, hosts.hostfile, "--set", "deepspeed=offload.json"
            )
    finally:
        hosts.control("shape")
        smi.unlink()
        subprocess.run(
            hosts.on(
                2,
                *limits,
                f"--nofile={before[0]}:{before[1]}",
                f"--memlock={before[2]}:{before[3]}",
            ),
            check=True,
        )
    for name in (
        "a package of another version",
        "another commit",
        "no model on one host",
        "unreadable data on one host",
        "other data on one host",
        "no compiler",
        "an op that is not built",
        "few open files",
        "little shared memory",
        "a loopback host name",
        "a clock that is wrong",
        "a missing GPU",
        "little locked memory",
        "a slow link",
    ):
        told(name, found, status, seconds, **named(hosts))
    if OTHER_PYTHON:
        told("another Python", found, status, seconds, **named(hosts))


@pytest.mark.parametrize(
    "value, name", [("eth7", "an interface that is not there"), ("lo", "the loopback interface")]
)
def test_wrong_interface(
    value: str,
    name: str,
    hosts: Cluster,
    job: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The user's own choice stands; where it leads nowhere that is said before a collective hangs
    on it.
    """
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    told(name, *examined(capsys, hosts.hostfile), **named(hosts))


def test_blocked_ports(hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ssh passes, the port range does not: host 2 cannot open connections to host 1 there."""
    rule = [
        "to",
        f"{hosts.addresses[0]}/32",
        "ipproto",
        "tcp",
        "dport",
        "29500-29510",
        "unreachable",
    ]
    subprocess.run(hosts.on(2, "ip", "rule", "add", *rule), check=True)
    try:
        told(
            "blocked ports",
            *examined(capsys, hosts.hostfile, "--ports", "29500-29510"),
            **named(hosts),
        )
    finally:
        subprocess.run(hosts.on(2, "ip", "rule", "del", *rule), check=True)


def test_taken_master_port(hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import socket, sys; s = socket.socket(); s.bind(('', 29511)); s.listen(); print('up',"
        " flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        hosts.on(1, sys.executable, "-c", code), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        seen = examined(capsys, hosts.hostfile, "--ports", "29511-29511")
        told(
            "a master port that is taken", *seen, bad=hosts.host_names[0], good=hosts.host_names[1]
        )
    finally:
        holder.communicate()  # a signal would end its way into the host alone


def test_run_directories_that_one_host_cannot_use(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (job / "run").mkdir()
    with mounted(hosts, (job / "run", job / "run")):
        subprocess.run(hosts.on(2, "mount", "-o", "remount,bind,ro", str(job / "run")), check=True)
        told("no write permission on one host", *examined(capsys, hosts.hostfile), **named(hosts))
    with mounted(hosts, ("tmpfs", job / "run")):
        told(
            "a run directory that is not shared", *examined(capsys, hosts.hostfile), **named(hosts)
        )
    with mounted(
        hosts,
        (
            "tmpfs",
            REPO / ".venv/bin" if (REPO / ".venv/bin").is_dir() else Path(sys.executable).parent,
        ),
    ):
        told("no environment on one host", *examined(capsys, hosts.hostfile), **named(hosts))


def test_little_and_no_disk(
    hosts: Cluster, job: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "--set",
        f"run_dir={small_disk}/run",
        "--set",
        "deepspeed=offload.json",
        "--set",
        "data.train=[pool.jsonl]",
    )
    found, status, seconds = examined(capsys, hosts.hostfile, *words)
    assert status == 0
    told("little disk", found, 2, seconds, **named(hosts))
    with open(small_disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 2**16)
    try:
        told("a full disk at the start", *examined(capsys, hosts.hostfile, *words), **named(hosts))
    finally:
        (small_disk / "filler").unlink()
