"""What is measured of a set of rows: how many targets and bytes each row has, which half of the
prompts it belongs to, and at which targets the divergence from the base model is taken.

Reads prepared rows; writes nothing. No torch import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.statistics import Ints

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class MeasuredSet:
    """Rows with input_ids and labels, and of each of the N rows: tokens (lengths), targets that a
    model predicts, bytes of their text, whether it belongs to the choice half (else the audit
    half). positions: per row the places among its targets at which the divergence is measured.
    """

    name: str
    rows: Any
    lengths: Ints
    targets: Ints
    target_bytes: Ints
    choice: Bools
    positions: list[Ints]

    def thinned(self, share: float) -> MeasuredSet:
        """The same set with the divergence measured at this share of its targets."""
        return replace(self, positions=spread_positions(self.targets, share))


def measured_set(name: str, rows: Any, tokenizer: Any) -> MeasuredSet:
    """The set with no positions for the divergence yet."""
    samples = list(rows)
    targets = [predicted_targets(sample) for sample in samples]
    return MeasuredSet(
        name,
        rows,
        np.array([len(sample["input_ids"]) for sample in samples], np.int64),
        np.array([len(found) for found in targets], np.int64),
        np.array(
            [text_bytes(s, t, tokenizer) for s, t in zip(samples, targets, strict=True)], np.int64
        ),
        np.array([in_choice_half(prompt_of(sample)) for sample in samples], bool),
        [np.empty(0, np.int64)] * len(samples),
    )


def predicted_targets(sample: Mapping[str, Any]) -> list[int]:
    """Positions of the target tokens; the first token is predicted by nothing."""
    labels = sample["labels"]
    return [i for i in range(1, len(labels)) if labels[i] != IGNORE_INDEX]


def prompt_of(sample: Mapping[str, Any]) -> list[int]:
    """The token ids before the first target; the whole row where there is none."""
    first = next((i for i, label in enumerate(sample["labels"]) if label != IGNORE_INDEX), None)
    return [int(token) for token in sample["input_ids"][:first]]


def content_key(content: Sequence[int] | str) -> bytes:
    """16 bytes that depend on a prompt's content alone (blake2b)."""
    data = content.encode() if isinstance(content, str) else np.asarray(content, "<i8").tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def in_choice_half(content: Sequence[int] | str) -> bool:
    """Whether a prompt belongs to the half that models are chosen by; the other half audits the
    choice. A prompt belongs to one half wherever it stands, and however often.
    """
    return content_key(content)[0] < 128


def text_bytes(sample: Mapping[str, Any], targets: Sequence[int], tokenizer: Any) -> int:
    """UTF-8 bytes of the targets' text, without special tokens; each run of targets is decoded
    together.
    """
    ids, runs = sample["input_ids"], list[list[int]]()
    for place, i in enumerate(targets):
        if place == 0 or targets[place - 1] != i - 1:
            runs.append([])
        runs[-1].append(int(ids[i]))
    texts = [
        tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for run in runs
    ]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def spread_positions(targets: Ints, share: float) -> list[Ints]:
    """Of every row, places among its targets: `share` of all targets together, evenly spread over
    the rows laid end to end. int64 arrays, one a row; some are empty where the share is small.
    """
    total, share = int(targets.sum()), min(share, 1.0)
    marks = np.floor(np.arange(total + 1) * share + 0.5)
    taken = np.flatnonzero(np.diff(marks) > 0)
    stops = np.cumsum(targets)
    row = np.searchsorted(stops, taken, side="right")
    place = taken - (stops - targets)[row]
    cuts = np.searchsorted(row, np.arange(1, len(targets)))
    return [np.asarray(part, np.int64) for part in np.split(place, cuts)]
