"""`kill -9` of the launcher over two hosts and a start in the same second: no rank works beside
another start's, and the table is the undisturbed run's.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from tests.cluster import Cluster
from tests.launcher import cluster_runs
from tests.launcher.cluster_runs import GRADS_DS, environment, needs
from tests.launcher.jobs import left_behind

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]
job, hosts = cluster_runs.job, cluster_runs.hosts
ROUNDS = 3  # of kills, at another moment each


def test_a_start_in_the_second_of_the_kill_gives_the_undisturbed_table(
    job: Path, hosts: Cluster
) -> None:
    needs("pdsh")

    def start(name: str) -> subprocess.Popen[str]:
        words = ["probe", "config.yaml", "--set", f"run_dir={name}", "--hosts", str(hosts.hostfile)]
        return subprocess.Popen(
            [*GRADS_DS, *words, "--backend", "pdsh"],
            cwd=job,
            env=environment(hosts.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    for name in ("calm", "killed"):
        prepared = [*GRADS_DS, "prepare", "config.yaml", "--set", f"run_dir={name}"]
        subprocess.run(prepared, cwd=job, env=environment(hosts.environment), check=True)
    calm = start("calm")
    assert calm.wait(timeout=200) == 0
    for number in range(ROUNDS):
        process = start("killed")
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            files = sorted((job / "killed/logs/probe").glob("*/rank*.json"))[-2:]
            if len(files) == 2 and all('"running"' in file.read_text() for file in files):
                break
            time.sleep(0.05)
        time.sleep(2.0 * number)  # while they start, load, record
        process.kill()
        process.wait()
    last = start("killed")
    said = last.communicate(timeout=300)[0]
    assert last.returncode == 0, said[-3000:]
    assert "still at work" in said or "which has ended" in said
    tables = [
        parquet.read_table(job / name / "scores/table.parquet").sort_by("sample_id")
        for name in ("calm", "killed")
    ]
    assert tables[0].equals(tables[1])
    assert left_behind(str(job), 30) == []
