"""Near-duplicates inside a subset: MinHash over word 5-grams, buckets by locality-sensitive hashing
(datasketch).

Reads the user's rows as they are accepted, so that only the chosen and the dropped are ever hashed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from grads_ds.config.errors import UserError

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
