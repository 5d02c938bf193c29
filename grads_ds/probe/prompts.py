"""A sample's targets behind another prompt, or behind none: rows of token lists, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.statistics import Ints


def without_prompt(sample: Mapping[str, Any]) -> dict[str, list[int]]:
    """The target tokens alone, each run of them behind the one token before it (the end of the
    template's assistant mark).

    As many target tokens as the whole sample has, so that the two losses are means over the same
    tokens.
    """
    ids, labels = list(sample["input_ids"]), list(sample["labels"])
    keep = [
        i
        for i in range(len(ids))
        if labels[i] != IGNORE_INDEX or (i + 1 < len(ids) and labels[i + 1] != IGNORE_INDEX)
    ]
    keep = keep or [0]
    return {"input_ids": [ids[i] for i in keep], "labels": [labels[i] for i in keep]}


def first_target(sample: Mapping[str, Any]) -> int:
    """The position of the first target token; the number of tokens where there is none."""
    labels = sample["labels"]
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def has_prompt(sample: Mapping[str, Any]) -> bool:
    """Whether anything but a mark of the beginning stands before the first target: without, the
    columns that ask what the prompt changes have no value, and a swapped answer is no problem.
    """
    return 1 < first_target(sample) < len(sample["labels"])


def behind_prompt_of(
    sample: Mapping[str, Any], other: Mapping[str, Any], longest: int
) -> dict[str, list[int]]:
    """`sample` from its first target on, behind what stands before `other`'s first target.

    The prompt loses tokens at its beginning where the row would exceed `longest` tokens or its own
    length, whichever is more; at least one token stays before the targets.
    """
    start = first_target(sample)
    ids, labels = list(sample["input_ids"][start:]), list(sample["labels"][start:])
    prompt = list(other["input_ids"][: first_target(other)])
    most = max(1, max(longest, len(sample["input_ids"])) - len(ids))
    prompt = prompt[-most:] or [sample["input_ids"][0]]
    return {"input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + labels}


def partners(count: int, others: int, seed: int) -> Ints:
    """Which other rows' prompts each of `count` rows is put to: int64 [count, others].

    A drawn ring in which every row takes its next neighbours: no row meets itself (unless it is
    the only one), and every prompt is used equally often.
    """
    ring = np.random.default_rng([seed, 7]).permutation(count)
    place = np.empty(count, np.int64)
    place[ring] = np.arange(count)
    steps = np.arange(1, others + 1)
    return np.asarray(ring[(place[:, None] + steps) % count], np.int64)
