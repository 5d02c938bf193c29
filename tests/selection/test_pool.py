"""The pool is read chunk by chunk: any size of text, any order of rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from grads_ds.config.errors import UserError
from grads_ds.selection.pool import Pool, composition, read_pool


def test_rows_are_read_in_the_order_asked_for_from_uneven_chunks() -> None:
    chunks = [
        [f"row {i}" for i in range(a, b)] for a, b in ((0, 1), (1, 1), (1, 900), (900, 20_000))
    ]
    column = pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks])
    pool = Pool(pa.table({"row": column}), np.arange(20_000))
    positions = np.random.default_rng(0).permutation(20_000)
    assert list(pool.rows(positions)) == [f"row {i}" for i in positions]


def test_rows_of_more_text_than_one_arrow_array_holds() -> None:
    block = pa.array(["x" * 2**20] * 64)
    # one block 33 times: 2.06 GB of text in 64 MB of memory
    column = pa.chunked_array([block] * 33)
    pool = Pool(pa.table({"row": column}), np.arange(33 * 64))
    assert [len(text) for text in pool.rows(np.array([2111, 0]))] == [2**20, 2**20]


def test_ids_need_not_be_positions() -> None:
    pool = Pool(pa.table({"row": ["a", "b", "c"]}), np.array([7, 3, 9]))
    assert pool.positions(np.array([3, 9, 7])).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match="1 missing, the first sample_id 8"):
        pool.positions(np.array([3, 8]))


def test_composition_sums_the_rare_values() -> None:
    values = [f"v{i:03d}" for i in range(60)]
    codes = np.repeat(np.arange(60), np.arange(61, 1, -1))
    selected = codes >= 50
    table = composition({"field": (codes, values)}, selected)["field"]
    assert len(table) == 51
    assert table["v000"]["pool"] == 61
    assert table["(other)"]["selected"] == selected.sum()
    assert sum(entry["pool"] for entry in table.values()) == len(codes)


def test_a_folder_that_is_no_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run prepare first"):
        read_pool(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    with pa.ipc.new_stream(tmp_path / "data.arrow", pa.schema([("row", pa.string())])) as writer:
        writer.write_table(pa.table({"row": ["{}"]}))
    with pytest.raises(UserError, match="wanted columns sample_id, source in"):
        read_pool(tmp_path)
