"""What ZeRO-3 knows of the order of a model's modules, kept right between passes of several kinds.

DeepSpeed 0.19.8 records the modules of one pass, gathers ahead along that order and caches what
each of them releases. It takes every pass for one of a training: forward, backward, by the engine.
"""

from __future__ import annotations

from typing import Any

from grads_ds.workarounds import forget_release_plans

_ORDER = "_PartitionedParameterCoordinator__submodule_order"  # a tuple once it is recorded
_FORGOTTEN = "grads_ds_order_at_last_forgetting"  # on the coordinator: it holds the model's modules


def release_leftovers(engine: Any, beside: bool = False) -> None:
    """Release what ZeRO-3 keeps gathered after a backward it did not start (the embedding), and
    forget what its modules release when their order is another. Called after every pass.

    beside: the pass was a forward alone between passes with a backward. Its order of modules is the
    beginning of theirs, so theirs serves both; its own is discarded by the next backward. A record
    of it is dropped, and the next pass is recorded.
    """
    if (leftovers := getattr(engine.optimizer, "release_backward_leftovers", None)) is None:
        return
    leftovers()
    coordinator = _coordinator(engine)
    if coordinator is None:
        forget_release_plans()
        return
    if beside and coordinator.is_record_trace():
        coordinator._invalidate_trace()
    order = getattr(coordinator, _ORDER, None)
    if not isinstance(order, tuple) or getattr(coordinator, _FORGOTTEN, None) is not order:
        forget_release_plans()
        setattr(coordinator, _FORGOTTEN, order)


def _coordinator(engine: Any) -> Any:
    """What holds the order; None where this DeepSpeed keeps it elsewhere.

    An engine without an optimizer has the offload itself in the optimizer's place.
    """
    owner = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    found = getattr(owner, "param_coordinator", None)
    known = all(hasattr(found, name) for name in ("is_record_trace", "_invalidate_trace"))
    return found if known else None
