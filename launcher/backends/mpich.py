"""MPICH's mpiexec (Hydra) as a starter of processes; the ranks themselves talk gloo or NCCL.

Called directly: DeepSpeed's wrapper (0.19.8) wants equal slots and never returns a status.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from grads_ds.launcher.backends import Command, Job, missing
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.network import address_towards

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
    return [Command([*call, *job.supervisor()], job.environment, {machines: text})]


def faults(hosts: Sequence[Host]) -> list[str]:
    """A missing Hydra."""
    return (
        []
        if any(shutil.which(name) for name in PROGRAMS)
        else missing(PROGRAMS[0], package="mpich")
    )
