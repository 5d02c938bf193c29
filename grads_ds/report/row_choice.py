"""Which rows of the pool the page holds, and the counts that stay exact for all of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.report.read_run import Bools
from grads_ds.selection.numbers import random_keys
from grads_ds.statistics import Floats, Ints

HELD = 2000  # rows; a pool of no more is held whole
EXTREMES = 40  # rows at either end of each column
DRAWN = 500  # selected rows, and as many others, that a seeded draw adds
VALUES = 50  # values of a field that can be chosen; the rest is one, "(other)"
COUNTED = 4000  # combinations of values with a count of their own
OTHER = "(other)"


@dataclass(frozen=True)
class Field:
    """A field to filter by: per row of the pool an index into `values`, int64 [N]."""

    name: str
    codes: Ints
    values: list[str]


def held_rows(sample_id: Ints, columns: Mapping[str, Floats], selected: Bools, seed: int) -> Ints:
    """Rows that the page holds, ascending: all of a small pool; else both ends of every column
    (finite values [N]) and a draw that `seed` fixes, half of it from the selected.
    """
    if len(sample_id) <= HELD:
        return np.arange(len(sample_id))
    held = []
    for values in columns.values():
        rows = np.flatnonzero(np.isfinite(values))
        for signed in (values[rows], -values[rows]):
            held.append(rows[_smallest(signed, EXTREMES)])
    keys = random_keys(sample_id, seed)
    for group in (selected, ~selected):
        rows = np.flatnonzero(group)
        held.append(rows[_smallest(keys[rows], DRAWN)])
    return np.unique(np.concatenate(held))


def _smallest(values: NDArray[Any], count: int) -> Ints:
    if len(values) <= count:
        return np.arange(len(values))
    return np.asarray(np.argpartition(values, count)[:count], dtype=np.int64)


def folded(field: Field, values: int = VALUES) -> Field:
    """The field with its commonest values alone; the rest is counted as one."""
    counts = np.bincount(field.codes, minlength=len(field.values))
    order = sorted(range(len(counts)), key=lambda code: (-int(counts[code]), field.values[code]))
    order = [code for code in order if counts[code]]
    kept, rest = order[:values], order[values:]
    place = np.full(max(1, len(counts)), len(kept), dtype=np.int64)
    place[kept] = np.arange(len(kept))
    return Field(
        field.name, place[field.codes], [field.values[c] for c in kept] + [OTHER] * bool(rest)
    )


def counted(fields: list[Field], selected: Bools) -> tuple[list[Field], list[list[int]]]:
    """(the fields, folded as far as COUNTED demands; per combination of their values that occurs:
    the index of each value, rows of the pool, rows of them that are selected).
    """
    fields = [folded(field) for field in fields]
    while True:
        key = np.zeros(len(selected), dtype=np.int64)
        for field in fields:
            key = key * max(1, len(field.values)) + field.codes
        found, first, place = np.unique(key, return_index=True, return_inverse=True)
        if len(found) <= COUNTED:
            break
        widest = max(range(len(fields)), key=lambda i: len(fields[i].values))
        fields[widest] = folded(fields[widest], len(fields[widest].values) // 2)
    pool = np.bincount(place, minlength=len(found))
    chosen = np.bincount(place[selected], minlength=len(found))
    rows = [
        [*(int(field.codes[at]) for field in fields), int(pool[i]), int(chosen[i])]
        for i, at in enumerate(first.tolist())
    ]
    return fields, rows
