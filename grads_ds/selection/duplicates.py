"""Near-duplicates inside a subset: MinHash over word 5-grams, buckets by locality-sensitive hashing
(datasketch).

Reads the user's rows as they are accepted, so that only the chosen and the dropped are ever hashed
(all, where the likeliest of each group is wanted).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from grads_ds.config.errors import UserError
from grads_ds.statistics import Floats, Ints

COMPARED = 200_000  # rows that auto compares: each takes a millisecond and 2 kB
PERMUTATIONS = 128
SHINGLE = 5
_WORD = re.compile(r"\w+")


def seen_before(text_of: Callable[[int], str], threshold: float) -> Callable[[int], int | None]:
    """A function of a row: the accepted row it resembles (estimated Jaccard >= `threshold`), else
    None, and it is accepted.

    `text_of` gives a row's JSON. Of several alike the earliest accepted is named. Raises UserError
    without datasketch.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise UserError(
            "select.near_duplicates: wanted the package datasketch; found none installed; pip"
            " install datasketch, or set near_duplicates: null"
        ) from None
    # the buckets only propose: the estimate decides, so they may be generous
    buckets = MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=PERMUTATIONS)
    accepted: list[tuple[int, Any]] = []

    def like(row: int) -> int | None:
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([piece.encode() for piece in sorted(shingles(text_of(row)))])
        for place in sorted(buckets.query(sketch)):
            other, print_ = accepted[place]
            if sketch.jaccard(print_) >= threshold:
                return other
        buckets.insert(len(accepted), sketch)
        accepted.append((row, sketch))
        return None

    return like


def likeliest_of_each(
    order: Ints, loss: Floats, like: Callable[[int], int | None], last: bool = False
) -> tuple[Ints, dict[int, int]]:
    """The order with one row for each group of near-duplicates, in the place of the group's first:
    the one of lowest loss. A copy with a slip costs the model more than what it is a copy of.

    All rows of the order are compared, so that the groups do not depend on the budget.

    Args:
        order: rows of the table, best first.
        loss: of all rows of the table.
        like: see `seen_before`.
        last: these come after the rows that are like no other.

    Returns the order, and {dropped row: row that stands for it}.
    """
    members: dict[int, list[int]] = {}
    for row in order.tolist():
        first = like(row)
        members.setdefault(row if first is None else first, []).append(row)
    # of equal losses the first in the order
    kept = [min(group, key=lambda row: float(loss[row])) for group in members.values()]
    twins = {
        row: stays
        for stays, group in zip(kept, members.values(), strict=True)
        for row in group
        if row != stays
    }
    if last:
        alike = set(twins.values())
        kept = sorted(kept, key=lambda row: row in alike)
    return np.array(kept, dtype=np.int64), twins


def shingles(row_json: str) -> set[str]:
    """Word 5-grams of all texts in a row, lower-cased; a shorter row is one piece."""
    words = [word.lower() for text in _texts(json.loads(row_json)) for word in _WORD.findall(text)]
    if len(words) <= SHINGLE:
        return {" ".join(words)}
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [
            text
            for key in sorted(value)
            if key not in ("role", "from")
            for text in _texts(value[key])
        ]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return []
