"""Rows to look up: which are held, counts of all, what is said of one, and texts that stay text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_ds.config.config import Config
from grads_ds.report import row_table
from grads_ds.report.number_words import percent
from grads_ds.report.read_run import read_run
from grads_ds.report.row_choice import COUNTED, HELD, OTHER, Field, counted, folded, held_rows
from grads_ds.report.row_table import as_data
from tests.report.html_page import Page, block
from tests.report.synthetic_run import make_run


def test_a_small_pool_is_held_whole_with_its_numbers(run: tuple[Config, Page]) -> None:
    config, page = run
    data = block(page)
    table = pq.read_table(Path(config.run_dir) / "scores/table.parquet").to_pandas()
    table = table.sort_values("sample_id").reset_index()
    assert data["ids"] == list(range(1200)) and data["total"] == 1200
    loss = np.array(data["values"][data["columns"].index("loss")], dtype=float)
    np.testing.assert_allclose(loss[3:], table.loss[3:], rtol=1e-5)
    assert np.isnan(loss[:3]).all()
    assert "holds every row of the pool" in page.text["rows"]


def test_a_large_pool_is_held_at_both_ends_and_by_a_seeded_draw() -> None:
    rng = np.random.default_rng(0)
    n = 50_000
    columns = {"signal": rng.normal(size=n), "loss": rng.random(n)}
    columns["loss"][7] = np.nan
    selected = rng.random(n) < 0.05
    ids = np.arange(n)
    held = held_rows(ids, columns, selected, seed=3)
    assert len(held) <= HELD and np.array_equal(held, np.unique(held))
    for values in columns.values():
        order = np.argsort(np.nan_to_num(values, nan=0.5))
        assert set(order[:10]) | set(order[-10:]) <= set(held.tolist())
    inside = selected[held].sum()
    assert inside > 450 and len(held) - inside > 450
    assert np.array_equal(held, held_rows(ids, columns, selected, seed=3))
    assert not np.array_equal(held, held_rows(ids, columns, selected, seed=4))


@pytest.mark.parametrize("widths", [(3, 4), (2000, 3), (300, 300)])
def test_counts_are_those_of_every_row_of_the_pool(widths: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    n = 20_000
    fields = [
        Field(f"f{i}", rng.geometric(3 / width, n) % width, [f"v{v}" for v in range(width)])
        for i, width in enumerate(widths)
    ]
    selected = rng.random(n) < 0.1
    kept, lines = counted(fields, selected)
    assert len(lines) <= COUNTED
    assert sum(line[2] for line in lines) == n
    assert sum(line[3] for line in lines) == selected.sum()
    for place, (field, whole) in enumerate(zip(kept, fields, strict=True)):
        for code, value in enumerate(field.values):
            pool = sum(line[2] for line in lines if line[place] == code)
            if value != OTHER:
                assert pool == (whole.codes == whole.values.index(value)).sum()


def test_the_commonest_values_keep_their_names() -> None:
    field = folded(Field("kind", np.array([0, 1, 1, 2, 2, 2]), ["a", "b", "c"]), 2)
    assert field.values == ["c", "b", OTHER]
    assert field.codes.tolist() == [2, 1, 1, 0, 0, 0]


def test_one_row_is_explained_by_its_reason_its_place_and_other_subsets(
    run: tuple[Config, Page],
) -> None:
    config, page = run
    data = block(page)
    folder = Path(config.run_dir) / "selection"
    main = pq.read_table(folder / "selection.parquet").to_pandas()
    half = pq.read_table(folder / "variants/grads_50/selection.parquet").to_pandas()
    row = int(main.sample_id[main.selected].iloc[0])
    said = data["words"][row]
    rank = int(main["rank"][row])
    assert said[0] == (
        f"Selected by grads: at or above. It is number {rank} of 1,197 in the rule's order; the"
        " last selected row is number 60."
    )
    signal = main.signal.to_numpy(float)
    below = (signal[np.isfinite(signal)] < signal[row]).sum()
    assert f"above {percent(below / 1197)}" in said[1].split("; ")[0]
    assert ("in grads_50" in said[2]) == bool(half.selected[row])
    assert data["words"][0][0] == "Not selected by grads: below."


def test_reasons_that_name_a_sample_are_one_value_to_filter_by() -> None:
    column = pa.chunked_array([["in: x", "out: near-duplicate of sample 3"], [None, "in: x"]])
    column = pa.chunked_array([*column.chunks, ["out: near-duplicate of sample 77"]])
    field = row_table._reasons(column)
    assert [field.values[code] for code in field.codes] == [
        "in: x",
        "out: near-duplicate of another sample",
        "(empty)",
        "in: x",
        "out: near-duplicate of another sample",
    ]


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "&lt;b&gt;\\u003c",
    "\u202eevil\u2066 \u200f \x1b[31m \x00 \u2028",
    'quote " backslash \\ ',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_cannot_leave_the_block_of_data(text: str) -> None:
    data = as_data({"text": text})
    assert not re.search(r"[<>&]", data)
    assert json.loads(data) == {"text": text}


def test_texts_are_cut_until_the_page_is_small_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, n=300, variants=False)
    run_dir = Path(config.run_dir)
    rows = [{"messages": [{"role": "user", "content": "<\u6f22>" * 3000}]}] * 300
    monkeypatch.setattr(
        row_table, "read_rows", lambda _, ids: {i: {"row": json.dumps(rows[i])} for i in ids}
    )
    monkeypatch.setattr(row_table, "PAGE_BYTES", 600_000)
    shown = row_table.rows(read_run(config, run_dir), None)
    assert len(shown["data"].encode()) <= 600_000 and 100 < shown["limit"] < 1000
    assert all(parts[0][1].endswith("…") for parts in json.loads(shown["data"])["texts"])
