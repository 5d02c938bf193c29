"""Row numbers in a data loader's batches: what the loader fetched, for whoever reads the batch.

Works with any torch data loader whose batches come from `__getitems__`, its worker processes
included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NUMBERS = "grads_ds_row_numbers"  # the batch's key, from the data loader to the model


class _Rows(list[Any]):
    """A batch's rows as the data set gave them, and their numbers."""

    numbers: list[int]


@dataclass
class _Fetch:
    """In the place of a data set's `__getitems__`, which data loaders call with the row numbers of
    a batch.
    """

    dataset: Any

    def __call__(self, numbers: list[int]) -> _Rows:
        several = getattr(type(self.dataset), "__getitems__", None)
        rows = _Rows(
            several(self.dataset, numbers)
            if several
            else [self.dataset[number] for number in numbers]
        )
        rows.numbers = [int(number) for number in numbers]
        return rows


@dataclass
class _Collate:
    """A collator that adds the rows' numbers to the batch it makes."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, rows: _Rows) -> Any:
        batch = self.collate(list(rows))
        batch[NUMBERS] = torch.tensor(rows.numbers)
        return batch


@contextlib.contextmanager
def numbered(loader: Any) -> Any:
    """While active, the loader's batches hold the numbers of their rows under NUMBERS, from its
    worker processes too.
    """
    # Accelerate's loaders look everything up in the one they hold
    loader = getattr(loader, "base_dataloader", loader)
    dataset, collate = loader.dataset, loader.collate_fn
    dataset.__getitems__, loader.collate_fn = _Fetch(dataset), _Collate(collate)
    try:
        yield
    finally:
        del dataset.__getitems__
        loader.collate_fn = collate
