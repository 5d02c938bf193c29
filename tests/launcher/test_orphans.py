"""A start after `kill -9` of the launcher never works beside the old ranks: it names them, stops
them and waits; and what a killed launcher leaves of the environment is removed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.cli import main
from grads_ds.flow.launch import clear_after_killed_start
from grads_ds.launcher import orphans
from grads_ds.launcher.job_status import snapshot
from grads_ds.launcher.status_text import status_text
from grads_ds.run_dir.ownership import MARKER
from grads_ds.run_dir.publish import publish_json
from tests import forked_ranks
from tests.cluster import Cluster
from tests.launcher.jobs import left_behind

RANKS = """
import sys; sys.path[:0] = [{repo!r}, {tests!r}]
from pathlib import Path
from grads_ds.launcher.hosts import read_hostfile
from grads_ds.launcher.job import Placement, run_job
place = Placement(read_hostfile({hostfile!r}), {backend!r})
words = [sys.executable, "-c", "import time; time.sleep(600)", {here!r}]
run_job("probe", words, place, Path("logs"))
"""


def killed_launcher(hosts: Cluster, folder: Path, backend: str) -> None:
    """Start a job of two hosts in `folder` and kill its launcher once both ranks run."""
    code = RANKS.format(
        repo=str(REPO),
        tests=str(REPO / "tests"),
        hostfile=str(hosts.hostfile),
        backend=backend,
        here=str(folder),
    )
    python = forked_ranks.interpreter() if backend == "pdsh" else sys.executable
    launcher = subprocess.Popen([python, "-c", code], cwd=folder, env=hosts.environment)
    for _ in range(600):
        time.sleep(0.1)
        files = list((folder / "logs").glob("probe/*/rank*.json"))
        if sum('"running"' in file.read_text() for file in files) == 2:
            break
    launcher.kill()
    launcher.wait()


@pytest.mark.cluster
def test_a_start_after_kill_9_of_the_launcher_waits_for_the_old_ranks(
    hosts: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed over pdsh goes on without its launcher for a minute. `status` names the ranks."""
    killed_launcher(hosts, tmp_path, "pdsh")
    first, second = hosts.host_names
    text = status_text(snapshot(tmp_path), ("probe",))
    assert f"without a launcher: rank 0 on {first}, rank 1 on {second} still at work" in text
    began = time.monotonic()
    clear_after_killed_start(tmp_path)
    assert time.monotonic() - began < 30
    assert f"still at work: rank 0 on {first}, rank 1 on {second}" in capsys.readouterr().err
    records = [json.loads(f.read_text()) for f in tmp_path.glob("logs/probe/*/rank*.json")]
    assert [record["state"] for record in records] == ["stopped", "stopped"]
    # DeepSpeed's runner takes some seconds to notice that its ranks have ended
    assert left_behind(str(tmp_path), seconds=30) == []
    assert "without a launcher" not in status_text(snapshot(tmp_path), ("probe",))


@pytest.mark.cluster
def test_stop_ends_ranks_that_have_no_launcher(hosts: Cluster, tmp_path: Path) -> None:
    killed_launcher(hosts, tmp_path, "openmpi")
    publish_json(tmp_path / MARKER, {})
    assert main(["stop", str(tmp_path)]) == 0
    assert left_behind(str(tmp_path)) == [] and not (tmp_path / "lock.json").exists()


def test_ranks_of_a_host_that_is_gone_are_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their records do not change; how old they look says how long that is watched."""
    monkeypatch.setattr(orphans, "BRIEF_SECONDS", 0.5)
    monkeypatch.setattr(orphans, "SILENT_SECONDS", 2.0)
    for age, within in ((3600.0, 1.5), (1.0, 4.0)):
        folder = tmp_path / str(age) / "logs/probe/then"
        folder.mkdir(parents=True)
        (folder / "job.json").write_text("{}")
        record = {"rank": 0, "host": "gone", "state": "running", "time": time.time() - age}
        (folder / "rank00000.json").write_text(json.dumps(record))
        said: list[str] = []
        began = time.monotonic()
        assert orphans.end(tmp_path / str(age), "a test", said.append) == 1
        assert time.monotonic() - began < within and "rank 0 on gone" in said[0]
        assert json.loads((folder / "control.json").read_text())["stop"] == "a test"


def test_a_start_removes_the_environment_that_a_killed_one_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("probe", "sft"):
        folder = tmp_path / "logs" / stage / "then"
        folder.mkdir(parents=True)
        (folder / "environment.json").write_text('{"HF_TOKEN": "secret"}')
    clear_after_killed_start(tmp_path)
    assert not list(tmp_path.rglob("environment.json"))
    assert "2 environment files" in capsys.readouterr().err


def test_ranks_that_outlive_their_launcher_remove_their_environment(tmp_path: Path) -> None:
    """Killed before the last rank has begun: the supervisor that waits for it removes the file."""
    code = RANKS.format(
        repo=str(REPO), tests=str(REPO / "tests"), hostfile="", backend="local", here=str(tmp_path)
    ).replace("read_hostfile('')", "[Host('localhost', 2)]")
    code = code.replace("import read_hostfile", "import Host")
    # the second rank's supervisor never starts
    never = (
        "import grads_ds.launcher.backends.local as local\n"
        "every = local.commands\n"
        "local.commands = lambda job: every(job)[:1]\n"
    )
    code = code.replace("place =", never + "place =")
    environment = os.environ | {"MY_TOKEN": "secret"}
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    while not any('"running"' in f.read_text() for f in tmp_path.glob("logs/*/*/rank00000.json")):
        time.sleep(0.05)
    assert list(tmp_path.rglob("environment.json"))  # rank 1 has yet to read it
    launcher.kill()
    launcher.wait()
    assert left_behind(str(tmp_path), 20) == []
    assert not list(tmp_path.rglob("environment.json"))
