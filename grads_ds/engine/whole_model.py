"""A sharded frozen model made whole on every rank for a while, where memory allows: what asks for
one token after another then gathers no layer again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from grads_ds.distributed import ranks
from grads_ds.engine.device_memory import free_bytes
from grads_ds.engine.memory_shares import PARAMETERS
from grads_ds.engine.model import gathered_parameters


@contextlib.contextmanager
def whole_model(engine: Any) -> Iterator[bool]:
    """Inside, the parameters of `engine`'s model are whole on every rank, if each rank has room for
    them; yields whether they are. Every rank calls this. Sharded again behind it.
    """
    apart = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    size = sum(p.ds_numel * p.element_size() for p in apart)
    room = min(ranks.all_gather_object(PARAMETERS * free_bytes()))
    if not apart or size > room:
        yield not apart
        return
    with gathered_parameters(apart), _without_hooks(engine.optimizer):
        yield True


@contextlib.contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """Inside, modules neither gather nor release parameters: DeepSpeed's release of a module takes
    apart also what GatheredParameters holds (0.19.8).
    """
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload.setup_zero_stage3_hooks()
