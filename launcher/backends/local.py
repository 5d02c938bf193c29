"""This machine alone: the launcher starts the supervisors itself."""

from __future__ import annotations

from collections.abc import Sequence

from grads_ds.launcher.ask_hosts import ask_here as ask
from grads_ds.launcher.backends import Command, Job
from grads_ds.launcher.hosts import Host

__all__ = ["ENTRY", "RUNNER_SETS", "ask", "commands", "problems"]
ENTRY = "here"
RUNNER_SETS: tuple[str, ...] = ()


def commands(job: Job) -> list[Command]:
    """One process for each rank."""
    return [
        Command(
            job.supervisor(),
            job.environment
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)},
        )
        for rank in range(job.ranks)
    ]


def problems(hosts: Sequence[Host]) -> list[str]:
    """None: there is nothing to be missing."""
    return []
