"""Ending an engine so that the next model of the same process finds its memory free: one process
trains and judges many models.

DeepSpeed's `destroy` leaves two references to a sharded model behind, in private places (seen with
DeepSpeed 0.19.8): a list of every module ever sharded, and a cache of which parameters a module
releases. Both are emptied here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator


def close(engine: Any) -> None:
    """Destroy an engine and whatever would keep its model alive.

    The caller's own references are the caller's to drop.
    """
    module = engine.module
    engine.destroy()
    sharded = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    sharded[:] = [kept for kept in sharded if kept is not module]
    decorated = getattr(
        PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None
    )
    for cell in getattr(decorated, "__closure__", None) or ():
        forget = getattr(cell.cell_contents, "cache_clear", None)
        if forget is not None:
            forget()  # of engines that live on as well: they fill it again
