"""Open MPI's mpirun as a starter of processes; the ranks themselves talk gloo or NCCL.

Called directly: DeepSpeed's wrapper (0.19.8) fixes the interface to eth0 and UCX to tcp and refuses
chosen hosts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from grads_ds.launcher.ask_hosts import ask_by_ssh as ask
from grads_ds.launcher.backends import Command, Job, missing
from grads_ds.launcher.hosts import Host, hostfile_text

__all__ = ["ENTRY", "RUNNER_SETS", "ask", "commands", "problems"]
ENTRY = "ssh"
RUNNER_SETS: tuple[str, ...] = ()


def commands(job: Job) -> list[Command]:
    """The `mpirun` call: ranks fill the hosts in their order; no binding, that is the ranks' own
    matter.
    """
    hostfile = job.folder / "hostfile"
    call = [
        "mpirun",
        "--hostfile",
        str(hostfile),
        "-n",
        str(job.ranks),
        "--map-by",
        "slot",
        "--bind-to",
        "none",
    ]
    if os.geteuid() == 0:
        call.append("--allow-run-as-root")  # containers; refused otherwise
    if job.ssh_port is not None:
        call += ["--mca", "plm_rsh_args", f"-p {job.ssh_port}"]
    return [
        Command([*call, *job.supervisor()], job.environment, {hostfile: hostfile_text(job.hosts)})
    ]


def problems(hosts: Sequence[Host]) -> list[str]:
    """A missing mpirun, or another MPI's."""
    return missing("mpirun", package="openmpi-bin")
