"""What `run` meets by itself on two hosts: data that differs, locks, a disk that fills."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from conftest import make_tiny_model
from grads_ds.cli import main
from grads_ds.launcher.hosts import read_hostfile
from grads_ds.run_dir.ownership import claim
from tests.cluster import Cluster
from tests.launcher import doctor_cluster
from tests.launcher.doctor_cluster import mounted
from tests.launcher.faults import told
from tests.launcher.jobs import left_behind, run_code

hosts, job, small_disk = doctor_cluster.hosts, doctor_cluster.job, doctor_cluster.small_disk
pytestmark = pytest.mark.cluster


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
    claim(job / "run")
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
