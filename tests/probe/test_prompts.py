"""A sample behind another prompt, or behind none: its targets stay, every prompt is used alike."""

from __future__ import annotations

import numpy as np
import pytest

from grads_ds.probe.prompts import behind_prompt_of, partners, without_prompt


def test_another_prompt_keeps_the_targets_and_the_room() -> None:
    sample = {"input_ids": [1, 2, 3, 50, 51], "labels": [-100, -100, -100, 50, 51]}
    other = {"input_ids": list(range(10, 20)), "labels": [-100] * 8 + [18, 19]}
    whole = behind_prompt_of(sample, other, longest=20)
    assert whole["input_ids"] == [*range(10, 18), 50, 51]
    assert whole["labels"] == [-100] * 8 + [50, 51]
    # its beginning is cut where the row would grow beyond what any row may have
    assert behind_prompt_of(sample, other, longest=4)["input_ids"] == [15, 16, 17, 50, 51]


@pytest.mark.parametrize("count", [2, 3, 40])
def test_every_prompt_is_used_equally_often_and_never_ones_own(count: int) -> None:
    found = partners(count, 1, seed=0)[:, 0]
    assert sorted(found) == list(range(count))
    assert not (found == np.arange(count)).any()


def test_without_the_prompt_the_targets_stay_the_same() -> None:
    ids, labels = (
        list(range(10, 22)),
        [-100, -100, -100, 13, 14, -100, -100, -100, 18, 19, 20, -100],
    )
    bare = without_prompt({"input_ids": ids, "labels": labels})
    assert bare["input_ids"] == [12, 13, 14, 17, 18, 19, 20]
    assert bare["labels"] == [-100, 13, 14, -100, 18, 19, 20]
    assert without_prompt({"input_ids": [1, 2], "labels": [1, 2]}) == {
        "input_ids": [1, 2],
        "labels": [1, 2],
    }
    assert without_prompt({"input_ids": [1, 2], "labels": [-100, -100]})["input_ids"] == [1]
