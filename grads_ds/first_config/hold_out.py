"""A held-out split of a pool that has none: seeded, by source, and free of what stays in the pool.

A row may be held out when no other row says the same, and when at most SHARED of its answer's word
8-grams stand in the answer of any other row: the measure by which `prepare` counts near-duplicates.
So a template or a source that repeats itself stays in the pool as a whole. Reads the spool of
`look_at_rows`; `write_split` writes two folders of JSONL, a file for each source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from grads_ds.data.leaks import SHARED, learned_text, word_grams
from grads_ds.first_config.look_at_rows import Rows, spooled

SHARE, MOST, LEAST = 0.1, 300, 40  # of the pool; rows; rows where the pool allows it
_TRIED = 6  # candidates looked at for each row wanted


@dataclass(frozen=True)
class Split:
    """`held_out` bool [N]; how many of the candidates that were looked at repeat another row, by
    the whole or by their answers; whether near-duplicates had to be taken because nothing else is
    there.
    """

    held_out: np.ndarray
    looked_at: int
    repeated: int
    near: bool


def wanted_rows(number: int) -> int:
    """How many of `number` rows to hold out: a tenth, but at least LEAST and at most MOST, and
    never more than a third.
    """
    return min(max(round(SHARE * number), LEAST), MOST, number // 3)


def candidates(rows: Rows) -> np.ndarray:
    """The rows that may be held out and are worth tokenising, bool [N]: of each source those of
    smallest key that no other row equals.
    """
    _, place, counts = np.unique(rows.keys, return_inverse=True, return_counts=True)
    alone = counts[place] == 1
    found = np.zeros(len(rows.keys), bool)
    for positions, wanted in _by_source(rows, wanted_rows(len(rows.keys))).values():
        single = positions[alone[positions]]
        found[single[np.argsort(rows.keys[single])][: _TRIED * wanted]] = True
    return found


def hold_out(rows: Rows, tried: np.ndarray, max_length: int) -> Split:
    """The split. `tried` are the candidates, tokenised; `max_length` cuts the rows.

    Where too few rows differ enough from the pool, near-duplicates are taken and the split says so.
    """
    known = rows.lengths > 0
    fitting = rows.usable(max_length)
    usable = tried & fitting
    new = usable & _differ(rows, usable)
    # of the rows that can be learned: the pool has to keep some of them
    share_fitting = int((fitting & known).sum()) / max(1, int(known.sum()))
    wanted = wanted_rows(round(share_fitting * len(rows.keys)))
    near = bool(wanted) and int(new.sum()) < min(wanted, 8)
    held_out = np.zeros(len(rows.keys), bool)
    for positions, share in _by_source(rows, wanted).values():
        open_to = positions[(usable if near else new)[positions]]
        held_out[open_to[np.argsort(rows.keys[open_to])][:share]] = True
    return Split(held_out, int(usable.sum()), int((usable & ~new).sum()), near)


def write_split(
    rows: Rows, split: Split, folder: Path, parts: Sequence[str] = ("train", "held_out")
) -> tuple[int, int]:
    """Write `folder`/train and `folder`/held_out (or one of `parts`), the rows as given; rows in
    each.
    """
    names = _file_names(list(rows.formats))
    written = dict.fromkeys(parts, 0)
    numbered = enumerate(spooled(rows.spool))
    for source, given in groupby(numbered, key=lambda one: one[1][0].source):
        kept: dict[str, list[str]] = {part: [] for part in parts}
        for i, (_, text) in given:
            part = "held_out" if split.held_out[i] else "train"
            if i not in rows.bad and part in kept:
                kept[part].append(text + "\n")
        for part, lines in kept.items():
            if lines:
                (folder / part).mkdir(parents=True, exist_ok=True)
                with (folder / part / f"{names[source]}.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(lines)
                written[part] += len(lines)
    return written.get("train", 0), written.get("held_out", 0)


def _by_source(rows: Rows, wanted: int) -> dict[str, tuple[np.ndarray, int]]:
    """Of each source: where its rows are, and how many of them to hold out."""
    counts, number = Counter(rows.sources), len(rows.sources)
    names = np.asarray(rows.sources)
    return {
        source: (np.flatnonzero(names == source), -(-wanted * count // number))
        for source, count in sorted(counts.items())
    }


def _differ(rows: Rows, asked: np.ndarray) -> np.ndarray:
    """Of the rows asked for those whose answers share at most SHARED of their 8-grams with other
    rows' answers, bool [N].

    Two passes over the spool, so that the 8-grams of the rows asked for alone are kept.
    """
    grams = {
        i: word_grams(learned_text(sample))
        for i, (sample, _) in enumerate(spooled(rows.spool))
        if asked[i]
    }
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams.values()]))
    holders = np.zeros(len(known), np.int64)  # rows that hold each 8-gram
    for i, (sample, _) in enumerate(spooled(rows.spool)) if len(known) else ():
        mine = grams[i] if i in grams else word_grams(learned_text(sample))
        place = np.minimum(np.searchsorted(known, mine), len(known) - 1)
        holders[place[known[place] == mine]] += 1
    differ = np.zeros(len(rows.keys), bool)
    for i, mine in grams.items():
        elsewhere = holders[np.searchsorted(known, mine)] > 1
        differ[i] = not len(mine) or elsewhere.mean() <= SHARED
    return differ


def _file_names(sources: list[str]) -> dict[str, str]:
    """A file name for each source; sources that become the same one are numbered."""
    names: dict[str, str] = {}
    for source in sources:
        plain = re.sub(r"[^\w.-]+", "_", source).strip("._") or "rows"
        taken = sum(name == plain or name.startswith(f"{plain}_v") for name in names.values())
        names[source] = f"{plain}_v{taken + 1}" if taken else plain
    return names
