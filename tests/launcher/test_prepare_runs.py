"""`grads-ds prepare --hosts` on two hosts that reach each other by ssh: both make parts, a host
that goes down costs what it had begun, and a run directory that is not shared is found at once.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conftest import make_tiny_model
from tests.cluster import Cluster, cluster
from tests.data.test_prepare import tree
from tests.launcher.cluster_runs import environment, needs
from tests.launcher.jobs import left_behind

pytestmark = pytest.mark.cluster
BLOCKS = 32  # of 8,192 rows: each host takes seven before it starts more processes
# pools of a few blocks are worth it here
COMMAND = (
    "from grads_ds.data import shares; shares.HOSTS_FROM = 1\n"
    "import sys; from grads_ds.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


@pytest.fixture
def job(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "pool.jsonl").write_text('{"text": "the sky is blue"}\n')
    (tmp_path / "held.jsonl").write_text('{"text": "the sky is 3"}\n')
    data = {"train": ["pool.jsonl"], "validation": {"domain": "held.jsonl"}, "format": "text"}
    config = {"run_dir": "run", "model": {"path": "model"}, "data": data | {"max_length": 32}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def start(job: Path, hosts: Cluster, *words: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", COMMAND, "prepare", "config.yaml", *words]
    return subprocess.Popen(
        call,
        cwd=job,
        env=environment(hosts.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_directory_of_its_own_is_found_before_any_work(job: Path, hosts: Cluster) -> None:
    run = job / "run"
    run.mkdir()
    subprocess.run(hosts.on(2, "mount", "-t", "tmpfs", "tmpfs", str(run)), check=True)
    try:
        prepare = start(job, hosts, "--hosts", str(hosts.hostfile), "--backend", "openmpi")
        said = prepare.communicate(timeout=120)[0]
    finally:
        subprocess.run(hosts.on(2, "umount", str(run)), check=True)
    assert prepare.returncode == 2, said
    words = " ".join(said.split())
    assert f"{hosts.addresses[1]}: run directory: wanted {run} on a file system that all" in words
    assert "found another folder of that name here, or none; put run_dir on one" in words
    assert hosts.addresses[0] not in words  # that one shares it
    left = sorted(path.name for path in run.iterdir())
    assert not any(name.startswith(("prepared", ".shared")) for name in left), left


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("backend", ["pdsh"])
def test_two_hosts_prepare_what_one_does_though_one_goes_down(
    job: Path, hosts: Cluster, backend: str
) -> None:
    """tests/data/test_shares.py is its quick twin, with ranks of this machine."""
    needs("pdsh")
    rows = (json.dumps({"text": f"the sky is {n}"}) for n in range(BLOCKS * 8192))
    (job / "pool.jsonl").write_text("\n".join(rows))
    words = ("--hosts", str(hosts.hostfile), "--backend", backend, "--lost-seconds", "5")
    first = start(job, hosts, *words)
    pool = job / "run/prepared.parts/pool"
    until = time.monotonic() + 600
    while len(list(pool.glob("*.taken"))) < 14 or len(list(pool.glob("*.arrow"))) < 2:
        assert first.poll() is None and time.monotonic() < until, first.communicate()[0][-3000:]
        time.sleep(0.05)
    hosts.control("kill", "2")
    try:
        said = first.communicate(timeout=600)[0]
        assert first.returncode == 4 and hosts.host_names[1] in said, said[-3000:]
    finally:
        hosts.control("boot", "2")
    left = {file: file.stat().st_mtime_ns for file in pool.glob("*.arrow")}
    assert 2 <= len(left) < BLOCKS and not (job / "run/prepared").exists()
    second = start(job, hosts, *words)
    seen: set[Path] = set()
    while second.poll() is None and time.monotonic() < until + 600:
        seen |= {f for f, when in left.items() if f.exists() and f.stat().st_mtime_ns == when}
        time.sleep(0.05)
    said = second.communicate(timeout=10)[0]
    assert second.returncode == 0 and seen == left.keys(), said[-3000:]
    made = [line for line in said.splitlines() if " blocks, " in line]
    assert [name in line for name, line in zip(hosts.host_names, made, strict=True)] == [True] * 2
    assert not any(" 0 blocks" in line for line in made), made  # both had work
    assert left_behind(str(job)) == []
    together = tree(job / "run/prepared")
    shutil.rmtree(job / "run")
    alone = start(job, hosts, "--ranks", "1")
    said = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, said[-3000:]
    assert tree(job / "run/prepared") == together
