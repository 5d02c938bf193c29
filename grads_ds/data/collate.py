"""Prepared rows -> one padded batch of numpy arrays. Reads and writes nothing; no torch import (the
caller makes tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

IGNORE_INDEX = -100  # the label of a token that is not a target


def pad_batch(
    samples: Sequence[Mapping[str, Any]],
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, np.ndarray]:
    """`input_ids`, `labels`, `attention_mask`, each int64 [rows, longest], of samples with
    `input_ids` and `labels`.

    Labels are aligned with input_ids (the model shifts them); padding has label IGNORE_INDEX and
    mask 0. Without samples the batch is one dummy row of two tokens that has no target: a rank that
    has run out of work still takes part in the step.
    """
    if not samples:
        ids = np.full((1, 2), pad_id, np.int64)
        return {
            "input_ids": ids,
            "labels": np.full((1, 2), IGNORE_INDEX, np.int64),
            "attention_mask": np.ones((1, 2), np.int64),
        }
    longest = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), longest)
    batch = {
        "input_ids": np.full(shape, pad_id, np.int64),
        "labels": np.full(shape, IGNORE_INDEX, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        if len(sample["labels"]) != length:
            raise ValueError(
                f"wanted as many labels as tokens, found {len(sample['labels'])} and {length}"
            )
        place = slice(0, length) if padding_side == "right" else slice(longest - length, longest)
        batch["input_ids"][row, place] = sample["input_ids"]
        batch["labels"][row, place] = sample["labels"]
        batch["attention_mask"][row, place] = 1
    return batch
