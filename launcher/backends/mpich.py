"""MPICH's mpiexec (Hydra) as a starter of processes; the ranks themselves talk gloo or NCCL.

Called directly: DeepSpeed's wrapper (0.19.8) wants equal slots and never returns a status.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from grads_ds.run_dir import publish_text
from launcher.backends import Command, Job, missing
from launcher.hosts import Host

PROGRAMS = ("mpiexec.hydra", "mpiexec.mpich")


def commands(job: Job) -> list[Command]:
    """The `mpiexec` call."""
    machines = job.folder / "machinefile"
    publish_text(machines, "".join(f"{host.name}:{host.slots}\n" for host in job.hosts))
    program = next((name for name in PROGRAMS if shutil.which(name)), PROGRAMS[0])
    return [Command([program, "-f", str(machines), "-n", str(job.ranks), *job.supervisor()], job.environment)]


def faults(hosts: Sequence[Host]) -> list[str]:
    """A missing Hydra."""
    return [] if any(shutil.which(name) for name in PROGRAMS) else missing(PROGRAMS[0], package="mpich")
