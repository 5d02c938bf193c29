"""What ranks must agree on before they go on: under ZeRO-3 all of them gather the same parameters
in the same order, so all must run as many forwards and backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks that go in step: those of `group` (None: all), or this one alone."""

    together: bool
    device: torch.device
    group: Any = None

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        return int(self._largest(torch.tensor([value], device=self.device)))

    def any_of(self, names: list[str], among: list[str]) -> list[str]:
        """The names that any rank has; `among` is the same list on every rank."""
        if not self.together:
            return names
        flags = torch.tensor([name in set(names) for name in among], device=self.device).int()
        found = self._largest(flags).tolist()
        return [name for name, flag in zip(among, found, strict=True) if flag]

    def _largest(self, values: Tensor) -> Tensor:
        if self.together:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values
