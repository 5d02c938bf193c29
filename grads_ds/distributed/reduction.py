"""Sums over all ranks of numpy arrays: through mpi4py in jobs that MPI started, through
torch.distributed in all others.

Reads the launcher's environment. mpi4py is imported in MPI-started jobs alone, so that its absence
stops no other job.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grads_ds.distributed import ranks
from grads_ds.launcher.runners import mpi_started


def all_reduce_sum(values: np.ndarray) -> np.ndarray:
    """The sum of every rank's `values` (int64, float32 or float64, the same shape everywhere), on
    every rank.

    Integers wrap around, as checksums want it.
    """
    communicator = _mpi()
    if communicator is not None:
        total = np.ascontiguousarray(values).copy()
        from mpi4py import MPI

        communicator.Allreduce(MPI.IN_PLACE, total, op=MPI.SUM)
        return total
    if ranks.world() == 1:
        return values.copy()
    import torch

    from grads_ds.distributed.device import device

    tensor = torch.from_numpy(np.ascontiguousarray(values).copy()).to(device())
    with ranks.everyone():
        torch.distributed.all_reduce(tensor)
    summed: np.ndarray = tensor.cpu().numpy()
    return summed


def reduction_backend() -> str:
    """Which library adds up, for the manifest."""
    return "mpi4py" if _mpi() is not None else "torch.distributed"


def _mpi() -> Any:
    if not mpi_started():
        return None
    try:
        from mpi4py import MPI
    except ImportError:  # no mpi4py, or no MPI library for it to load
        return None
    # one process of an MPI job may have started a torch job of its own
    return MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() == ranks.world() else None
