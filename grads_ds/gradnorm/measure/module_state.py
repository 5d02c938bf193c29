"""What modules keep from one call to the next as plain attributes (the recurrent state of
RecurrentGemma): as much an input of the next call as its arguments are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Snapshot = list[tuple[dict[str, Any], dict[str, Tensor | None]]]


@dataclass(frozen=True)
class Kept:
    """An attribute that a call changes: where it stands, its name, what it was before the call."""

    place: dict[str, Any]
    name: str
    value: Tensor | None


def snapshot(module: nn.Module) -> Snapshot:
    """The attributes of the module, and of those in it, that are tensors or empty."""
    return [
        (vars(part), {n: v for n, v in vars(part).items() if v is None or isinstance(v, Tensor)})
        for part in module.modules()
    ]


def changed_since(before: Snapshot) -> list[Kept]:
    """The attributes that are other tensors now."""
    return [
        Kept(place, name, value)
        for place, values in before
        for name, value in values.items()
        if place.get(name) is not value
    ]


@contextlib.contextmanager
def put_back(kept: Sequence[Kept], values: Sequence[Tensor | None]) -> Iterator[None]:
    """While active the attributes have these values."""
    now = [one.place.get(one.name) for one in kept]
    try:
        for one, value in zip(kept, values, strict=True):
            one.place[one.name] = value
        yield
    finally:
        for one, value in zip(kept, now, strict=True):
            one.place[one.name] = value


@contextlib.contextmanager
def state_left_alone(module: nn.Module) -> Iterator[None]:
    """What the module's calls change meanwhile is undone."""
    before = snapshot(module)
    try:
        yield
    finally:
        for one in changed_since(before):
            one.place[one.name] = one.value
