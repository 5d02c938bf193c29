"""Probe and SFT on two hosts through `grads-ds run`, under every kind of runner: DeepSpeed over
pdsh, Open MPI, a real Slurm.

And with a host lost in the middle of SFT: started again on both hosts, or with --elastic on the one
that is left, it ends as the run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.cluster import Cluster
from tests.launcher import cluster_runs
from tests.launcher.cluster_runs import (
    GRADS_DS,
    STEPS,
    Ran,
    check,
    environment,
    hosts_of,
    needs,
    run,
)
from tests.launcher.jobs import left_behind

job = cluster_runs.job
# a run may be started twice
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def calm(job: Path, hosts: Cluster) -> Ran:
    """The run that nobody disturbs, by Open MPI."""
    needs("mpirun")
    return run(job, hosts, "calm", "run", "--to", "sft", "--backend", "openmpi")


def test_probe_and_sft_on_two_hosts(job: Path, hosts: Cluster, calm: Ran) -> None:
    check(job / "calm", hosts)
    assert len(calm.losses) == 1 and sorted(calm.curve) == list(range(1, STEPS + 1))
    assert calm.curve[STEPS] < calm.curve[1] - 0.1  # it does train


def until_sft(job: Path, name: str) -> None:
    """A run directory of its own that is as the calm run was before SFT."""
    shutil.copytree(job / "calm", job / name)
    for made in ("sft", "tensorboard/sft", "logs/sft"):
        shutil.rmtree(job / name / made)
    (job / name / "state/sft.selected.json").unlink()


def kill_all_of(hosts: Cluster, host: int) -> int:
    """SIGKILL to every process that runs on a host, which is the job's alone, but for its sshd; how
    many there were.
    """
    listed = ["ip", "netns", "pids", hosts.host_names[host - 1]]
    killed = 0
    for pid in subprocess.run(
        listed, env=hosts.environment, capture_output=True, text=True
    ).stdout.split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            lines = Path("/proc", pid, "status").read_text().splitlines()
            inside = next(line.split()[1:] for line in lines if line.startswith("NSpid"))
            if len(inside) > 1 and inside[-1] != "1":  # the others hold the host's process tree up
                os.kill(int(pid), signal.SIGKILL)
                killed += 1
    return killed


def test_kill_9_of_a_hosts_processes_in_sft_changes_nothing(
    job: Path, hosts: Cluster, calm: Ran
) -> None:
    """By pdsh: all processes of the second host killed in SFT, and started again."""
    needs("pdsh")
    until_sft(job, "killed")
    killed: list[int] = []
    words = ("run", "--to", "sft", "--backend", "pdsh", "--max-restarts", "1")
    again = run(job, hosts, "killed", *words, disturb=lambda: killed.append(kill_all_of(hosts, 2)))
    assert killed[0] >= 4  # of ssh and DeepSpeed's launcher, the supervisor, the rank
    assert (
        f"rank 1 on {hosts.host_names[1]} fell silent" in again.said
        and "restart 1 of 1" in again.said
    )
    assert hosts_of(again.jobs["sft"]) == [hosts.host_names] * 2 and hosts_of(
        again.jobs["probe"]
    ) == [hosts.host_names]
    assert len(again.losses) == 2 and min(again.losses[1]) > 4  # it went on from a checkpoint
    same(again, calm)


def test_elastic_sft_goes_on_with_the_host_that_is_left(
    job: Path, hosts: Cluster, calm: Ran
) -> None:
    """The host of rank 0 goes down for good: the last checkpoint of two ranks is rewritten for one,
    compared, and trained on.
    """
    until_sft(job, "elastic")
    words = ("sft", "--backend", "openmpi", "--max-restarts", "1", "--elastic")
    try:
        left = run(job, hosts, "elastic", *words, disturb=lambda: hosts.control("kill", "1"))
    finally:
        hosts.control("boot", "1")
    assert (
        f"left out: hosts: {hosts.addresses[0]}" in left.said
        and ": rewriting it for 1 rank\n" in left.said
    )
    assert hosts_of(left.jobs["sft"]) == [hosts.host_names, hosts.host_names[1:]]
    assert len(left.losses) == 2 and min(left.losses[1]) > 4
    same(left, calm)


def same(other: Ran, calm: Ran) -> None:
    """The losses and weights of the calm run, but for rounding.

    A step is two micro-batches: two ranks reduce a + b, one rank accumulates a + b, and float32's
    sum of two has one order only. What may differ is the gradient's norm, summed over other shards:
    2**-24 of it for each of a few additions, which Adam divides out again. So a few units in the
    last place of a loss of about 5 (5e-7 each), and of the weights' updates.
    """
    assert sorted(other.curve) == sorted(calm.curve)
    assert max(abs(other.curve[step] - calm.curve[step]) for step in calm.curve) < 2e-6
    assert all(
        np.abs(other.weights[name] - calm.weights[name]).max() < 1e-6 for name in calm.weights
    )


def test_elastic_recording_goes_on_without_a_host_that_is_down(job: Path, hosts: Cluster) -> None:
    call = [
        *GRADS_DS,
        "run",
        "config.yaml",
        "--set",
        "run_dir=recorded",
        "--hosts",
        str(hosts.hostfile),
    ]
    call += ["--backend", "openmpi", "--to", "probe"]
    variables = environment(hosts.environment)

    def attempt(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*call, *words], cwd=job, env=variables, capture_output=True, text=True, timeout=200
        )

    hosts.control("kill", "2")
    try:
        refused = attempt()
        assert refused.returncode == 2 and hosts.addresses[1] in refused.stderr, refused.stderr
        done = attempt("--elastic")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert f"left out: hosts: {hosts.addresses[1]}" in done.stderr
        manifest = json.loads((job / "recorded/scores/manifest.json").read_text())
        assert manifest["hosts"] == hosts.host_names[:1]
    finally:
        hosts.control("boot", "2")
    assert left_behind(str(job)) == []
