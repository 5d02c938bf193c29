"""Faults of hosts, made to happen on two real hosts before anything runs: `grads-ds doctor` (and
`run`) tell each of them, with its status, within seconds. Independent ones are made to happen
together. Faults while a job runs are in test_cluster_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import REPO, make_tiny_model, write_rows
from grads_ds.cli import main
from grads_ds.launcher.doctor import examine
from grads_ds.launcher.hosts import read_hostfile
from tests.cluster import Cluster, cluster
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK, left_behind, run_code

pytestmark = pytest.mark.cluster
OTHER_PYTHON = next(
    (
        p
        for p in ("/usr/bin/python3.11",)
        if Path(p).exists() and Path(p) != Path(sys.executable).resolve()
    ),
    None,
)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 24 MiB; hosts made afterwards see it too."""
    folder = tmp_path_factory.mktemp("small")
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
        ).returncode
    ):
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def hosts(small_disk: Path) -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


@pytest.fixture
def job(hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with model, data and config, from which the commands run as a user's would."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    write_rows(tmp_path / "pool.jsonl", 8)
    write_rows(tmp_path / "held.jsonl", 8)
    offload = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "offload.json").write_text(json.dumps(offload))
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run",
        "model": {"path": "model"},
        "deepspeed": "zero3.json",
        "data": {"train": ["pool.jsonl"], "validation": {"domain": "held.jsonl"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PATH", hosts.environment["PATH"])
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examine, "LIMITS", QUICK)
    yield tmp_path
    assert left_behind(str(tmp_path)) == []


@contextlib.contextmanager
def mounted(hosts: Cluster, *mounts: tuple[str | Path, str | Path]) -> Iterator[None]:
    """On host 2, (source, target): a file or folder over another one, or "tmpfs" (with options:
    "tmpfs,size=64m").
    """
    done: list[str] = []
    try:
        for source, target in mounts:
            kind, _, options = str(source).partition(",")
            words = (
                ["-t", "tmpfs", *(["-o", options] if options else []), "tmpfs"]
                if kind == "tmpfs"
                else ["--bind", str(source)]
            )
            subprocess.run(hosts.on(2, "mount", *words, str(target)), check=True)
            done.append(str(target))
        yield
    finally:
        for target in reversed(done):
            subprocess.run(hosts.on(2, "umount", "-l", target), check=True)


def examined(
    capsys: pytest.CaptureFixture[str], hostfile: Path, *words: str
) -> tuple[str, int, float]:
    """(every finding that is not ok, or what stood on stderr; exit status; seconds) of a doctor's
    visit.
    """
    capsys.readouterr()
    began = time.monotonic()
    status = main(
        [
            "doctor",
            "config.yaml",
            "--hosts",
            str(hostfile),
            "--backend",
            "openmpi",
            "--json",
            *words,
        ]
    )
    seconds = time.monotonic() - began
    out, err = capsys.readouterr()
    found = [f for f in json.loads(out or "[]") if f["level"] != "ok"]
    # one each, whatever they quote
    lines = (f"{f['host']}: {f['check']}: {f['found']}; {f['advice']}" for f in found)
    return "\n".join([*(" ".join(line.split()) for line in lines), err]), status, seconds


def named(hosts: Cluster) -> dict[str, str]:
    """The addresses of the host that has a fault and of the other."""
    return {"bad": hosts.addresses[1], "good": hosts.addresses[0]}


def test_two_good_hosts_are_good(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, status, _ = examined(capsys, hosts.hostfile)
    assert status == 0 and "FAULT" not in found


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


LAX = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
SSH = {
    "no ssh key": f"{LAX} -o IdentityFile=/dev/null -o IdentitiesOnly=yes",
    "an unknown host key": "-o StrictHostKeyChecking=yes -o UserKnownHostsFile=/dev/null",
    "a changed host key": "-o StrictHostKeyChecking=yes -o UserKnownHostsFile={folder}/known",
    "a wrong port": f"{LAX} -p 9",
}


@pytest.mark.parametrize("name", SSH)
def test_a_host_that_ssh_cannot_enter(
    name: str,
    hosts: Cluster,
    job: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(job / "key")], check=True
    )
    key = (job / "key.pub").read_text()
    (job / "known").write_text("".join(f"{address} {key}" for address in hosts.addresses))
    (job / "bin").mkdir()
    (job / "bin/ssh").write_text(
        f'#!/bin/sh\nexec /usr/bin/ssh -F /dev/null {SSH[name].format(folder=job)} "$@"\n'
    )
    (job / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{job}/bin:{os.environ['PATH']}")
    told(name, *examined(capsys, hosts.hostfile), **named(hosts))


def test_hosts_that_are_not_there(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A login shell that lets nobody in, unknown names, a cut link, a host without processes."""
    shells = job / "passwd"
    shells.write_text(
        "root:x:0:0:root:/root:/usr/sbin/nologin\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    with mounted(hosts, (shells, "/etc/passwd")):
        told("a login shell that refuses", *examined(capsys, hosts.hostfile), **named(hosts))
    for host, name in (
        ("no-such-host.invalid", "a host name that does not resolve"),
        ("a;touch${IFS}x", "a host name with shell text"),
    ):
        (job / "hosts").write_text(f"{host} slots=1\n")
        told(name, *examined(capsys, job / "hosts"))
    assert not (job / "x").exists()
    for name, cut, mend in (
        ("a cut network", ("link", "2", "down"), ("link", "2", "up")),
        ("a host that is down", ("kill", "2"), ("boot", "2")),
    ):
        hosts.control(*cut)
        try:
            told(name, *examined(capsys, hosts.hostfile), **named(hosts))
        finally:
            hosts.control(*mend)


def test_run_looks_at_its_hosts_by_itself(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No doctor was asked: the stage is refused before a rank starts, within seconds."""
    make_tiny_model(job / "tiny")
    words = [
        "config.yaml",
        "--set",
        "model.path=tiny",
        "--set",
        "probe.epochs=0",
        "--set",
        "data.max_length=64",
    ]
    assert main(["prepare", *words]) == 0
    (job / "other.jsonl").write_text((job / "held.jsonl").read_text().replace("sky", "sea", 1))
    began = time.monotonic()
    with mounted(hosts, (job / "other.jsonl", job / "held.jsonl")):
        status = main(["probe", *words, "--hosts", str(hosts.hostfile), "--backend", "openmpi"])
    seconds = time.monotonic() - began
    told("a fault that only `run` meets", capsys.readouterr().err, status, seconds)
    assert not (job / "run/logs/probe").exists()


def test_locks_of_other_hosts(
    hosts: Cluster, job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADS_DS_LOCK", raising=False)
    make_tiny_model(job / "tiny")
    (job / "run").mkdir()
    lock = {
        "token": "x",
        "host": f"not-{socket.gethostname()}",
        "pid": 1,
        "what": "grads-ds run",
        "since": "2026-11-25 10:00:00",
    }
    (job / "run/lock.json").write_text(json.dumps(lock))
    words = ["prepare", "config.yaml", "--set", "model.path=tiny", "--set", "data.max_length=64"]
    began = time.monotonic()
    status = main(words)
    told("a run directory in use", capsys.readouterr().err, status, time.monotonic() - began)
    os.utime(job / "run/lock.json", (time.time() - 200,) * 2)
    began = time.monotonic()
    status = main(words)
    told("a stale lock", capsys.readouterr().err, status, time.monotonic() - began)


def test_a_disk_that_fills_in_the_middle(
    hosts: Cluster, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank's own words arrive although nothing new can be written: records go into the space
    they have.
    """
    monkeypatch.setenv("PATH", hosts.environment["PATH"])
    code = f"""
import traceback
heartbeat.beat("working")
time.sleep(1.5)
try:
    if rank == 1:
        with open({str(small_disk / "filler")!r}, "wb", buffering=0) as file:
            while file.write(b"0" * 65536): pass
            raise OSError(28, "No space left on device")
    time.sleep(60)
except OSError:
    heartbeat.failed(traceback.format_exc(), 1)
    raise
"""
    (small_disk / "job").mkdir()
    began = time.monotonic()
    try:
        outcome = run_code(
            code,
            small_disk / "job",
            monkeypatch,
            hosts=read_hostfile(hosts.hostfile),
            backend="openmpi",
        )
    finally:
        (small_disk / "filler").unlink()
    told(
        "a full disk in the middle",
        outcome.sentence + outcome.error,
        outcome.status,
        time.monotonic() - began,
    )
    assert left_behind(str(small_disk)) == []
