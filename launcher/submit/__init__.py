"""Queues that take a whole run as one job, in which the same command runs again and starts the
ranks by a backend: one file each, with the same names in it.

    NAME                    what --backend calls the queue, and the option --NAME KEY=VALUE for it
    HELP                    the help of that option
    WAITS                   whether --wait, which stays until the job is over, is for this queue
    MISPLACED               the problem when its options are given and the run does not go to it
    outside() -> bool       whether a run goes to the queue from here: not from inside its own job
    render(arguments, options, run_dir, grace) -> str   the job that runs `grads-ds ARGUMENTS`
    submit(job, run_dir, wait) -> int                   keeps the job under `logs/`, queues it

A new queue is one new file here: the command line finds it by its NAME.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol


class Queue(Protocol):
    """The signature all queues share."""

    NAME: str
    HELP: str
    WAITS: bool
    MISPLACED: str

    def outside(self) -> bool:
        """Whether a run goes to the queue from here."""

    def render(
        self, arguments: Sequence[str], options: Sequence[str], run_dir: Path, grace: float
    ) -> str:
        """The job, as its client reads it. Raises UserError with every problem.

        Args:
            arguments: words of the `grads-ds` command, without hosts and backend.
            options: KEY=VALUE, as `--NAME` was given them.
            run_dir: the run's directory.
            grace: seconds that the ranks get for a last checkpoint when the job is ended.
        """

    def submit(self, job: str, run_dir: Path, wait: bool) -> int:
        """Give the job to the queue; 0 once it is there or, with `wait`, what it ended with.

        Raises UserError when the queue's client is not installed.
        """


def _queues() -> dict[str, Queue]:
    found = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {queue.NAME: queue for queue in found}  # type: ignore[misc]


QUEUES = _queues()


def queue_for(backend: str | None) -> Queue | None:
    """The queue that a run with this `--backend` goes to from here; None where the launcher starts
    the ranks itself.
    """
    queue = QUEUES.get(backend or "")
    return queue if queue is not None and queue.outside() else None
