"""How much tensor memory is alive while code runs: now, and at most. Works on any device, the meta
device included.

Counts what the dispatcher creates (views cost nothing, a storage counts once and until its last
user lets go). The same counter predicts on meta tensors and measures real runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While entered: `now` and `peak` bytes of storages on devices of one type that were met inside
    and are still referenced.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensor: torch.Tensor) -> None:
        """Leave a storage that was there before (a parameter) out of the count, whatever is done to
        it. Once it is gone (a gathered parameter's is), its address may be another storage's.
        """
        storage = tensor.untyped_storage()
        self._known.add(storage._cdata)
        weakref.finalize(storage, self._known.discard, storage._cdata)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # what goes in as well: a loader's threads make tensors out of this mode's sight
        for tensor in _tensors((result, args, kwargs)):
            if tensor.device.type == self.device:
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an operator's argument or result, lists of tensors included. torch's own walk
    through any nested object takes longer than most operators do.
    """
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
