"""Held-out rows that are in the pool too: found by what is trained on, whatever their ids and other
fields are; and near-duplicates, whose answers share word 8-grams with answers of the pool.

The loss on such rows says little about new text. A row's words are those of its answers that are
learned (of plain text, all of them). Works on 64-bit hashes of tokens and 8-grams; reads and writes
nothing. The held-out sets have to be added before the pool.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from array import array
from dataclasses import dataclass, field

import numpy as np

from grads_ds.data.formats import Sample

GRAM = 8  # words
SHARED = 0.2  # of a row's 8-grams, from which on it counts as a near-duplicate
_WORD = re.compile(r"\w+")
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(1, GRAM + 1)], np.uint64)


@dataclass
class Prints:
    """What is compared of some rows: a hash of each row's tokens [N], all 8-grams' hashes [M], and
    how many of them each row has [N].
    """

    tokens: array[int] = field(default_factory=lambda: array("Q"))
    grams: list[np.ndarray] = field(default_factory=list)

    def add(self, ids: list[int], sample: Sample) -> None:
        """Add one row."""
        content = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8).digest()
        self.tokens.append(int.from_bytes(content, "little"))
        self.grams.append(word_grams(learned_text(sample)))


_NONE = np.zeros(0, np.uint64)


def word_grams(text: str) -> np.ndarray:
    """Hashes of the distinct word 8-grams, lower-cased, uint64; none of a shorter text, as short
    answers are alike without being copies.
    """
    words = _WORD.findall(text.lower())
    if len(words) < GRAM:
        return _NONE
    codes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
    windows = np.lib.stride_tricks.sliding_window_view(codes + np.uint64(1), GRAM)
    return np.unique((windows * _FACTORS).sum(axis=1, dtype=np.uint64))


def learned_text(sample: Sample) -> str:
    if sample.messages is None:
        return (sample.text or "")[sample.context :]
    return "\n".join(
        m["content"] for m in sample.messages if m["role"] == "assistant" and m.get("weight", 1)
    )


class Leaks:
    """Collects the prints of all sets and counts what they share."""

    def __init__(self) -> None:
        self._sets: dict[str, Prints] = {}
        self._known: np.ndarray | None = None  # sorted 8-grams of all held-out sets
        self._in_pool = np.zeros(0, bool)

    def add(self, name: str, prints: Prints) -> None:
        """Add rows of a set. Of the pool the tokens alone are kept; replayed rows are no set that
        is compared.
        """
        if name == "replay":
            return
        mine = self._sets.setdefault(name, Prints())
        mine.tokens += prints.tokens
        if name != "pool":
            mine.grams += prints.grams
            return
        if self._known is None:
            every = [g for held in self._sets.values() for g in held.grams]
            self._known = np.unique(np.concatenate([_NONE, *every]))
            self._in_pool = np.zeros(len(self._known), bool)
        if len(self._known):
            seen = np.concatenate([_NONE, *prints.grams])
            place = np.minimum(np.searchsorted(self._known, seen), len(self._known) - 1)
            self._in_pool[place[self._known[place] == seen]] = True

    def shared(self, name: str, other: str = "pool") -> int:
        """Rows of a set whose tokens are those of a row of another set."""
        return int(self._same(name, other).sum())

    def near(self, name: str) -> int:
        """Rows of a set that are not in the pool and share more than SHARED of their 8-grams with
        its answers.
        """
        if self._known is None or not len(self._known):
            return 0
        known, found = self._known, self._in_pool
        shares = [
            found[np.searchsorted(known, grams)].mean() if len(grams) else 0.0
            for grams in self._sets[name].grams
        ]
        return int((np.array(shares) > SHARED)[~self._same(name, "pool")].sum())

    def _same(self, name: str, other: str) -> np.ndarray:
        mine, theirs = (
            np.array(self._sets[key].tokens if key in self._sets else (), np.uint64)
            for key in (name, other)
        )
        return np.isin(mine, theirs)
