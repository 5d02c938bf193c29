"""Padding adds no target and no attention, on either side, and an idle rank's batch has nothing to
learn.
"""

from __future__ import annotations

import numpy as np
import pytest

from grads_ds.data.collate import IGNORE_INDEX, pad_batch

ROWS = [{"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]}, {"input_ids": [8], "labels": [8]}]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_come_back_out_of_the_padded_batch(side: str) -> None:
    batch = pad_batch(ROWS, pad_id=5, padding_side=side)  # type: ignore[arg-type]
    assert {(value.dtype, value.shape) for value in batch.values()} == {
        (np.dtype(np.int64), (2, 3))
    }
    for i, row in enumerate(ROWS):
        real = batch["attention_mask"][i] == 1
        assert batch["input_ids"][i][real].tolist() == row["input_ids"]
        assert batch["labels"][i][real].tolist() == row["labels"]
        assert set(batch["input_ids"][i][~real].tolist()) <= {5}
        assert set(batch["labels"][i][~real].tolist()) <= {IGNORE_INDEX}
    assert batch["attention_mask"][1].tolist() == ([1, 0, 0] if side == "right" else [0, 0, 1])


def test_an_empty_batch_is_one_row_without_targets() -> None:
    batch = pad_batch([], pad_id=3)
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["attention_mask"].tolist() == [[1, 1]]


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="as many labels"):
        pad_batch([{"input_ids": [1, 2], "labels": [1]}], 0)
