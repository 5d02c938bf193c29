"""Two hosts, a job and a small disk for the tests of faults that are found before anything runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import REPO, write_rows
from grads_ds.cli import main
from grads_ds.launcher.doctor import examine
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import QUICK, left_behind

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
