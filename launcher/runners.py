"""The variables of every runner that may stand between the launcher and a rank: one table.

deepspeed, torchrun, Open MPI, MPICH, MVAPICH and Slurm say by them which rank a process is; the
ranks' own code, the launcher's environment and the supervisors read this table. Standard library
only: every rank's supervisor imports it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Runner:
    """The variables by which a runner names a process's rank, its rank on its host and their
    number; what it tells one process alone (`own`); what it reads itself (`settings`).
    """

    rank: str
    local_rank: str
    world: str
    own: str
    settings: str = ""
    direct: bool = False  # ranks it starts without a supervisor take their rank from it
    mpi: str = ""  # the variable that says that MPI started this process


# what torch.distributed reads, by whatever name a runner has for it
TORCH_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
RUNNERS = (
    Runner(  # deepspeed, torchrun, this launcher
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "|".join(TORCH_VARIABLES)
        + r"|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|TORCHELASTIC_\w+|GROUP_RANK|GROUP_WORLD_SIZE"
        r"|ROLE_RANK|ROLE_NAME|ROLE_WORLD_SIZE",
        direct=True,
    ),
    Runner(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        r"OMPI_\w+|PRTE_\w+|PMIX\w*",
        r"OMPI_MCA_\w+|PRTE_MCA_\w+|OPAL_\w+|PMIX_MCA_\w+",
        direct=True,
        mpi="OMPI_COMM_WORLD_SIZE",
    ),
    Runner(  # MPICH; Slurm's PMI sets the first and the last too, where no MPI is
        "PMI_RANK",
        "MPI_LOCALRANKID",
        "PMI_SIZE",
        r"PMI_\w+|PMI2_\w+|HYDRA_\w+|HYDI_\w+|MPI_LOCAL\w+",
        r"HYDRA_\w+|MPIEXEC_\w+",
        mpi="MPI_LOCALNRANKS",
    ),
    Runner(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_SIZE",
        r"MV2_COMM_\w+",
        mpi="MV2_COMM_WORLD_SIZE",
    ),
    Runner(
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NTASKS",
        r"SLURM\w*|SBATCH_\w+|SRUN_\w+",
        r"SLURM\w*",
    ),
)
OWN = re.compile("|".join(f"(?:{runner.own})" for runner in RUNNERS))
SETTINGS = re.compile("|".join(f"(?:{runner.settings})" for runner in RUNNERS if runner.settings))


def rank_of(environment: Mapping[str, str], slots: Sequence[int]) -> tuple[int, int, int]:
    """(rank, local rank, world) by the runner's variables. Raises KeyError when no known runner
    started this process.

    The local rank follows from the slots where the runner counts along the host list; DeepSpeed
    0.19.8's own is wrong on hosts with unequal slots (rank modulo the slots of this host).
    """
    for runner in RUNNERS:
        if runner.rank in environment and runner.world in environment:
            rank, world = int(environment[runner.rank]), int(environment[runner.world])
            if runner.rank != "RANK" and runner.local_rank in environment:
                return rank, int(environment[runner.local_rank]), world
            before = 0
            for count in slots:
                if rank < before + count:
                    return rank, rank - before, world
                before += count
            return rank, int(environment.get(runner.local_rank, "0")), world
    names = ", ".join(runner.rank for runner in RUNNERS)
    raise KeyError(f"no runner's rank variables in the environment: {names}")


def launched_rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """The rank of a process that a runner started as one of a job's; None without one."""
    for runner in RUNNERS:
        if runner.direct and runner.rank in environment:
            return int(environment[runner.rank])
    return None


def mpi_started(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether MPI started this process (Slurm's own PMI variables do not mean that)."""
    return any(runner.mpi in environment for runner in RUNNERS if runner.mpi)
