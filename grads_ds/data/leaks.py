"""Held-out rows that are in the pool too: found by what is trained on, whatever their ids and other
fields are; and near-duplicates, whose answers share word 8-grams with answers of the pool.

The loss on such rows says little about new text. A row's words are those of its answers that are
learned (of plain text, all of them). Works on 64-bit hashes of tokens and 8-grams. The held-out
sets have to be added before the pool, of whose rows only that is kept which they hold too: memory
does not grow with the pool.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from grads_ds.data.formats import Sample
from grads_ds.run_dir.digests import DIGITS
from grads_ds.run_dir.publish import atomic_path

GRAM = 8  # words
SHARED = 0.2  # of a row's 8-grams, from which on it counts as a near-duplicate
_WORD = re.compile(r"\w+")
_NONE = np.zeros(0, np.uint64)
_FACTORS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(1, GRAM + 1)], np.uint64)


@dataclass(frozen=True)
class Known:
    """What the held-out sets hold, both sorted: hashes of rows' tokens, and of their word 8-grams,
    uint64. Of the pool nothing else has to be kept.
    """

    tokens: np.ndarray
    grams: np.ndarray

    @classmethod
    def nothing(cls) -> Known:
        """Where no set is compared with another."""
        return cls(_NONE, _NONE)

    def write(self, folder: Path) -> Path:
        """Write it for the processes that make parts; the file, named by what it holds."""
        digest = hashlib.sha256(self.tokens.tobytes() + b"|" + self.grams.tobytes()).hexdigest()
        file = folder / f"known-{digest[:DIGITS]}.npz"
        with atomic_path(file) as aside, aside.open("wb") as out:
            np.savez(out, tokens=self.tokens, grams=self.grams)
        return file

    @staticmethod
    @lru_cache(1)
    def read(file: Path) -> Known:
        """What `write` wrote, once in each process."""
        with np.load(file) as found:
            return Known(found["tokens"], found["grams"])


def prints_of(ids: list[int], sample: Sample, known: Known | None) -> tuple[int | None, np.ndarray]:
    """What is compared of a row: a hash of its tokens, and its 8-grams' hashes; of these what is
    `known` alone, where that is given.
    """
    if known is not None and not len(known.tokens):
        return None, _NONE
    content = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=8).digest()
    tokens, grams = int.from_bytes(content, "little"), word_grams(learned_text(sample))
    if known is None:
        return tokens, grams
    there = _found(np.array([tokens], np.uint64), known.tokens)
    return tokens if there[0] else None, grams[_found(grams, known.grams)]


def _found(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which of `values` are in the sorted array `among`, bool."""
    if not len(among):
        return np.zeros(len(values), bool)
    return among[np.minimum(np.searchsorted(among, values), len(among) - 1)] == values


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
        self._tokens: dict[str, list[np.ndarray]] = {}
        self._grams: dict[str, list[np.ndarray]] = {}
        self._known = Known.nothing()
        self._in_pool = np.zeros(0, bool)

    def add(self, name: str, tokens: np.ndarray, grams: list[np.ndarray]) -> None:
        """Add rows of a held-out set: hashes of their tokens uint64 [N], the 8-grams of each."""
        self._tokens.setdefault(name, []).append(tokens)
        self._grams.setdefault(name, []).extend(grams)

    def known(self) -> Known:
        """What the held-out sets hold. After this the pool may be added, and no set any more."""
        tokens = [values for group in self._tokens.values() for values in group]
        grams = [values for group in self._grams.values() for values in group]
        self._known = Known(
            *(np.unique(np.concatenate([_NONE, *all_])) for all_ in (tokens, grams))
        )
        self._in_pool = np.zeros(len(self._known.grams), bool)
        return self._known

    def add_pool(self, tokens: np.ndarray, grams: np.ndarray) -> None:
        """Add rows of the pool: of their prints what is known."""
        self._tokens.setdefault("pool", []).append(tokens)
        self._in_pool[np.searchsorted(self._known.grams, grams)] = True

    def shared(self, name: str, other: str = "pool") -> int:
        """Rows of a set whose tokens are those of a row of another set."""
        return int(self._same(name, other).sum())

    def near(self, name: str) -> int:
        """Rows of a set that are not in the pool and share more than SHARED of their 8-grams with
        its answers.
        """
        known, found = self._known.grams, self._in_pool
        shares = [
            found[np.searchsorted(known, grams)].mean() if len(grams) else 0.0
            for grams in self._grams.get(name, [])
        ]
        return int((np.array(shares) > SHARED)[~self._same(name, "pool")].sum())

    def _same(self, name: str, other: str) -> np.ndarray:
        mine, theirs = (
            np.concatenate([_NONE, *self._tokens.get(key, [])]) for key in (name, other)
        )
        return np.isin(mine, theirs)
