"""MPICH's mpiexec (Hydra) as a starter of processes; the ranks themselves talk gloo or NCCL.

Called directly: DeepSpeed's wrapper (0.19.8) wants equal slots and never returns a status.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from grads_ds.launcher.ask_hosts import ask_by_ssh as ask
from grads_ds.launcher.backends import Command, Job, missing
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.network import address_towards

__all__ = ["ENTRY", "RUNNER_SETS", "ask", "commands", "problems"]
ENTRY = "ssh"
RUNNER_SETS: tuple[str, ...] = ()

PROGRAMS = ("mpiexec.hydra", "mpiexec.mpich")


def commands(job: Job) -> list[Command]:
    """The `mpiexec` call."""
    machines = job.folder / "machinefile"
    text = "".join(f"{host.name}:{host.slots}\n" for host in job.hosts)
    program = next((name for name in PROGRAMS if shutil.which(name)), PROGRAMS[0])
    call = [program, "-f", str(machines), "-n", str(job.ranks)]
    # by default its proxies call back to this host's own name, which they may not be able to
    # resolve
    callback = next((found for host in job.hosts if (found := address_towards(host.address))), None)
    if callback:
        call += ["-localhost", callback]
    # Hydra knows no option for it
    port = {"HYDRA_LAUNCHER_EXTRA_ARGS": f"-p {job.ssh_port}"} if job.ssh_port is not None else {}
    return [Command([*call, *job.supervisor()], job.environment | port, {machines: text})]


def problems(hosts: Sequence[Host]) -> list[str]:
    """A missing Hydra."""
    return (
        []
        if any(shutil.which(name) for name in PROGRAMS)
        else missing(PROGRAMS[0], package="mpich")
    )
