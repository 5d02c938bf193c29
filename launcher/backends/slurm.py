"""Slurm's srun inside an allocation: the hosts are the allocation's (or fewer of them)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from grads_ds.launcher.ask_hosts import ask_by_slurm as ask
from grads_ds.launcher.backends import Command, Job, missing
from grads_ds.launcher.hosts import Host

__all__ = ["ENTRY", "RUNNER_SETS", "ask", "commands", "problems"]
ENTRY = "srun"
RUNNER_SETS: tuple[str, ...] = ()


def commands(job: Job) -> list[Command]:
    """The `srun` call.

    Ranks are placed by a list of hosts, one line a rank, so that unequal slots are kept too. They
    are not bound to cores, that is the ranks' own matter: Slurm may be set to bind each to one,
    where `prepare` starts a process for each core and a rank reads its rows beside computing.
    """
    listed = job.folder / "ranks.hosts"
    text = "".join(f"{host.name}\n" * host.slots for host in job.hosts)
    call = [
        "srun",
        "--nodes",
        str(len(job.hosts)),
        "--ntasks",
        str(job.ranks),
        "--distribution",
        "arbitrary",
    ]
    # the supervisors end their ranks; Slurm must not end a supervisor because another one is done
    call += ["--kill-on-bad-exit=0", "--unbuffered", "--export=ALL", "--overlap"]
    call += ["--cpu-bind=none"]
    return [
        Command(
            [*call, *job.supervisor()],
            job.environment | {"SLURM_HOSTFILE": str(listed)},
            {listed: text},
        )
    ]


def problems(hosts: Sequence[Host]) -> list[str]:
    """A missing srun, or no allocation."""
    found = missing("srun", package="slurm-client")
    if "SLURM_JOB_ID" not in os.environ:
        found.append(
            "wanted to run inside a Slurm allocation; found no SLURM_JOB_ID; start with salloc or"
            " sbatch"
        )
    return found
