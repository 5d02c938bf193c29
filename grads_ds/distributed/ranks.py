"""The ranks of one job: start and stop the process group, act on rank 0, share what it found.

Reads the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, ...). torch and deepspeed are
imported only by `start`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from grads_ds.config.errors import UserError, problem
from grads_ds.distributed.compiled_ops import (
    drop_letters,
    quote_torch_lib_path,
    skip_shared_memory_op,
)
from grads_ds.launcher import runners
from grads_ds.launcher.network import open_door
from grads_ds.launcher.process_group import join
from grads_ds.launcher.rendezvous import DOOR_VARIABLE
from grads_ds.workarounds import warn_of_other_versions

T = TypeVar("T")
_job: Any = None  # the group of all ranks, while libraries see a part of them


def launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return runners.launched_rank() is not None


def launched_rank() -> int:
    """This process's rank by the launcher's environment; 0 without one."""
    return runners.launched_rank() or 0


def foreign_variables() -> list[str]:
    """The problem of a shell that still holds another job's RANK or WORLD_SIZE; none where they
    agree with Open MPI's.

    mpirun hands the shell's variables to the ranks of its own host alone. DeepSpeed lets RANK and
    its kin win over MPI, so that rank 0 would run as a world of one and the others wait for it in
    MPI without end. Ranks that torchrun starts below one MPI process rightly disagree with it.
    """
    if "OMPI_COMM_WORLD_RANK" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    pairs = (("RANK", "OMPI_COMM_WORLD_RANK"), ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"))
    return [
        f"{name}: wanted {os.environ[theirs]}, as mpirun says; found {os.environ[name]} in the"
        f" shell that called mpirun; unset {name}"
        for name, theirs in pairs
        if os.environ.get(name, os.environ[theirs]) != os.environ[theirs]
    ]


def start() -> None:
    """Join the process group (gloo on CPU, NCCL on GPUs). A process started alone becomes a world
    of one.

    Raises UserError where the environment holds another job's rank, or a port that is taken.
    """
    import deepspeed
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator
    from deepspeed.constants import default_pg_timeout

    if dist.is_initialized():
        return
    if problems := foreign_variables():
        raise UserError(problems)
    if not launched():
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            DOOR_VARIABLE: str(open_door("127.0.0.1").detach()),
        }
    if launched_rank() == 0:
        warn_of_other_versions()
    skip_shared_memory_op(deepspeed)
    quote_torch_lib_path()
    drop_letters()
    join(get_accelerator().communication_backend_name(), default_pg_timeout)
    try:
        deepspeed.init_distributed(verbose=False)
    except dist.DistNetworkError as error:  # under another launcher, which has chosen the port
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(_taken_port()) from None


def _taken_port() -> str:
    """The problem of a port at which the ranks were to meet and another process listens."""
    return problem(
        "MASTER_PORT",
        f"a port that is free on {socket.gethostname()}, where rank 0 listens",
        f"{os.environ['MASTER_PORT']}, at which another process listens already (ss -tlnp)",
        "give the command that starts the ranks another --master_port, or leave the choice to"
        " grads-ds run",
    )


def finish() -> None:
    """Leave together: a rank that goes without a barrier can abort the others."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:  # mpirun takes a rank that ends without this for a failure
        mpi = sys.modules["mpi4py.MPI"]
        if mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.Finalize()


@contextlib.contextmanager
def libraries_see(group: Any) -> Iterator[None]:
    """Inside, torch's default process group, which libraries take where they name none, is `group`,
    a part of the job to which this rank belongs; the functions of this file go on to mean all
    ranks.
    """
    global _job
    assert _job is None, "a part of a part of the job"
    world = _torch().group
    _job, world.WORLD = world.WORLD, group
    try:
        yield
    finally:
        _job, world.WORLD = None, _job


@contextlib.contextmanager
def everyone() -> Iterator[Any]:
    """torch.distributed, whose default group is that of all ranks of the job; None outside one."""
    dist = _dist()
    if dist is None or _job is None:
        yield dist
        return
    part, dist.group.WORLD = dist.group.WORLD, _job
    try:
        yield dist
    finally:
        dist.group.WORLD = part


def in_step() -> list[int]:
    """The ranks that go in step with this one: those that libraries see."""
    dist = _dist()
    return dist.get_process_group_ranks(dist.group.WORLD) if dist else [0]


def store() -> Any:
    """The store through which the job's ranks met: small values, readable at any time."""
    with everyone() as dist:
        return dist.distributed_c10d._get_default_store()


def rank() -> int:
    """This process's rank; 0 outside a job."""
    with everyone() as dist:
        return dist.get_rank() if dist else 0


def world() -> int:
    """The number of ranks; 1 outside a job."""
    with everyone() as dist:
        return dist.get_world_size() if dist else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    with everyone() as dist:
        if dist:
            dist.barrier()


def from_main(find: Callable[[], T]) -> T:
    """Call `find` on rank 0 alone and return its value on every rank.

    A UserError raised there is raised everywhere.
    """
    if not _dist():
        return find()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = find()
        except UserError as error:
            box[1] = error.problems
    with everyone() as dist:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


@contextlib.contextmanager
def on_main(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Hold a context on rank 0 alone; a UserError raised on entering it is raised on every rank."""
    with contextlib.ExitStack() as stack:
        from_main(lambda: (stack.enter_context(make()), None)[1])
        yield


def all_gather_object(value: T) -> list[T]:
    """Every rank's value, on every rank, in rank order."""
    with everyone() as dist:
        if not dist:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def _dist() -> Any:
    dist = _torch()
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def _torch() -> Any:
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None else None
