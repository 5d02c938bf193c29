"""Probe and SFT as a batch job of a real Slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import forked_ranks, slurm
from tests.cluster import Cluster
from tests.launcher import cluster_runs
from tests.launcher.cluster_runs import GRADS_DS, SECONDS, check, environment
from tests.launcher.jobs import left_behind

job = cluster_runs.job
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


ODD = "a 'b' \"c\"\n$HOME;touch x `id` \\ é"


def test_probe_and_sft_as_a_slurm_batch_job(job: Path, hosts: Cluster) -> None:
    """Submitted from outside an allocation; the job finds its hosts in Slurm's environment and its
    status comes back.

    What the submitting shell holds arrives at every rank as it was, whatever characters it is made
    of. A rank may use every core that the job was given on its host, also where Slurm is set to
    bind each task to one.
    """
    path = forked_ranks.python_path()
    forks = path.partition(":")[0]
    (job / "spy").mkdir()
    (job / "spy/sitecustomize.py").write_text(
        f"import os\nif 'GRADS_DS_JOB_FOLDER' in os.environ:\n    open({str(job / 'spy')!r} + '/' +"
        " os.environ['RANK'], 'w').write(os.environ.get('ODD', 'nothing') +"
        " f'cores: {len(os.sched_getaffinity(0))}')\n"
        f"import runpy\nrunpy.run_path({f'{forks}/sitecustomize.py'!r})\n"
    )
    variables = environment(slurm.start(hosts)) | {
        "ODD": ODD,
        "PYTHONPATH": f"{job / 'spy'}:{path}",
    }
    call = [
        *GRADS_DS,
        "run",
        "config.yaml",
        "--set",
        "run_dir=slurm",
        "--set",
        "sft.epochs=1",
        "--to",
        "sft",
    ]
    call += [
        "--backend",
        "slurm",
        "--slurm",
        "nodes=2",
        "--slurm",
        f"cpus-per-task={len(os.sched_getaffinity(0))}",
        "--slurm",
        'comment=it\'s "odd"; $(touch x) `touch x`',
        "--wait",
    ]
    done = subprocess.run(
        hosts.on(1, *call), cwd=job, env=variables, capture_output=True, text=True, timeout=SECONDS
    )
    logs = "\n".join(file.read_text()[-3000:] for file in (job / "slurm/logs").glob("slurm-*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    check(job / "slurm", hosts)
    cores = len(os.sched_getaffinity(0))
    found = [(job / "spy" / rank).read_text() for rank in "01"]
    assert found == [f"{ODD}cores: {cores}"] * 2
    assert left_behind(str(job)) == [] and not list(job.rglob("x"))
    strange = variables | {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "a;touch x",
        "SLURM_TASKS_PER_NODE": "1",
    }
    inside = hosts.on(1, *GRADS_DS, "probe", "config.yaml", "--dry-run")
    refused = subprocess.run(
        inside, cwd=job, env=strange, capture_output=True, text=True, timeout=60
    )
    assert (
        refused.returncode == 2 and "give --hosts" in refused.stderr and not list(job.rglob("x"))
    ), refused.stderr
    again = [*call, "--set", "sft.batch_size=7"]
    wrong = subprocess.run(
        hosts.on(1, *again), cwd=job, env=variables, capture_output=True, text=True, timeout=120
    )
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
