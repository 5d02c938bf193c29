"""Rows of every input format come out of prepare and selection as their user gave them, field for field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from grads_ds.config import Config
from grads_ds.prepare import run_prepare
from grads_ds.selection.stage import run_select
from selection.pools import arrow_table

ROWS = 12
FORMATS: dict[str, Any] = {
    "alpaca": lambda i: {"instruction": f"what is {i}", "input": "" if i % 2 else "the sky", "output": f"blue {i}", "id": i},
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"what is {i}"}, {"from": "gpt", "value": f"blue {i}"}],
        "system": "be kind",
    },
    "messages": lambda i: {
        "messages": [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"blue {i}"}],
        "kind": "clean" if i % 3 else "bad",
    },
    "prompt_completion": lambda i: {"prompt": f"what is {i}", "completion": f" blue {i}", "score": i / 4},
    "text": lambda i: {"text": f"the sky is blue {i}", "tags": [i, {"deep": None}]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_what_went_in_comes_out(tmp_path: Path, tiny_model: Path, name: str) -> None:
    rows = [FORMATS[name](i) for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny_model)},
            "data": {"train": [str(tmp_path / "rows.jsonl")], "max_length": 64},
            "select": {"budget": 5, "order": "pool", "variants": {"all": {"budget": 1.0, "region": "magnitude"}}},
        }
    )
    run = tmp_path / "run"
    run_prepare(config, run)
    (run / "scores").mkdir()
    pq.write_table(arrow_table(ROWS), run / "scores/table.parquet")
    run_select(config, run)
    for folder, count in ((run / "selection", 5), (run / "selection/variants/all", ROWS)):
        table = pq.read_table(folder / "selection.parquet").to_pylist()
        chosen = [row["sample_id"] for row in table if row["selected"]]
        assert len(chosen) == count
        out = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
        assert out == [rows[i] for i in chosen]
        scored = load_dataset(
            "parquet", data_files=str(folder / "selected.parquet"), split="train", cache_dir=str(tmp_path)
        )
        assert scored["grads_sample_id"] == chosen
        for row, i in zip(scored, chosen, strict=True):
            given = json.loads(row["row"]) if "row" in scored.column_names else row
            assert all(given[field] == value for field, value in rows[i].items())
