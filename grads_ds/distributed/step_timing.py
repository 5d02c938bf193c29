"""What this rank's own work takes, apart from what it waits for other ranks: by it the launcher
names the ranks that are slow.

Ranks of a sharded model go in lockstep, so that every rank's step takes as long as the slowest
one's, and nobody's clock tells which that is. Here each rank times what needs no other rank: the
forward passes of the innermost modules (once their parameters are gathered) and the reading of
data. The sums go to its supervisor with the heartbeat; nothing is sent between ranks. On GPUs the
times are CUDA events', read when they are over, so that nothing is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grads_ds.distributed import heartbeat
from grads_ds.distributed.device import device


def attach(model: nn.Module) -> list[Any]:
    """Time the forward passes of `model` from now on; returns handles to `remove()`.

    Attach after the engine, whose hooks gather first.
    """
    if not heartbeat.supervised():
        return []
    clock = _Clock(device().type == "cuda")
    handles: list[Any] = [model.register_forward_pre_hook(clock.begin_step)]
    for module in model.modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(clock.begin))
            handles.append(module.register_forward_hook(clock.end, prepend=True))
    return handles


@contextlib.contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """The same for the length of a `with`."""
    handles = attach(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What happens inside is reading data."""
    began = time.perf_counter()
    try:
        yield
    finally:
        heartbeat.worked("reading", time.perf_counter() - began)


class Read:
    """`iterator`, whose every item is timed as reading data."""

    def __init__(self, iterator: Iterator[Any]):
        self.iterator = iterator

    def __iter__(self) -> Read:
        return self

    def __next__(self) -> Any:
        with reading():
            return next(self.iterator)


class _Clock:
    def __init__(self, cuda: bool):
        self.cuda = cuda
        # by module: a recomputed block may end before its last one has
        self.began: dict[int, Any] = {}
        self.spans: deque[tuple[Any, Any]] = deque()

    def begin_step(self, module: nn.Module, arguments: Any) -> None:
        while self.spans and self.spans[0][1].query():
            first, last = self.spans.popleft()
            heartbeat.worked("computing", first.elapsed_time(last) / 1000)
        heartbeat.stepped()

    def begin(self, module: nn.Module, arguments: Any) -> None:
        self.began[id(module)] = self._now()

    def end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        first = self.began.pop(id(module), None)
        if first is None:
            return
        if self.cuda:
            self.spans.append((first, self._now()))
        else:
            heartbeat.worked("computing", time.perf_counter() - first)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
