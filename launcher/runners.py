"""What the runners that start a job's processes say about which rank a process is.

Reads variables of deepspeed, torchrun, Open MPI, MPICH and Slurm. Standard library only: every
rank's supervisor imports it.
"""

from __future__ import annotations

# where the runners say which rank this is: (rank, local rank, number of ranks)
RUNNERS = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),  # deepspeed, torchrun, this launcher
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    # mpich; Slurm's PMI sets the first and the last too
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


def rank_of(environment: dict[str, str], slots: list[int]) -> tuple[int, int, int]:
    """(rank, local rank, world) by the runner's variables. Raises KeyError when no known runner
    started this process.

    The local rank follows from the slots where the runner counts along the host list; DeepSpeed
    0.19.8's own is wrong on hosts with unequal slots (rank modulo the slots of this host).
    """
    for rank_name, local_name, world_name in RUNNERS:
        if rank_name in environment and world_name in environment:
            rank, world = int(environment[rank_name]), int(environment[world_name])
            if rank_name != "RANK" and local_name in environment:
                return rank, int(environment[local_name]), world
            before = 0
            for count in slots:
                if rank < before + count:
                    return rank, rank - before, world
                before += count
            return rank, int(environment.get(local_name, "0")), world
    raise KeyError(
        "no runner's rank variables in the environment: " + ", ".join(names[0] for names in RUNNERS)
    )
