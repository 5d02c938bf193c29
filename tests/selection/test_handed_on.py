"""What select leaves is what people and sft take up: rows that prepare reads as the same samples
again, and weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from grads_ds.config.config import Config
from grads_ds.data.stage import run_prepare
from grads_ds.training.sft import training_rows
from selection.pools import arrow_table, run_select

N = 24
FORMATS: dict[str, Any] = {
    "messages": lambda q, a: {
        "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    },
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "text": lambda q, a: {"text": f"{q}\n{a}"},
}


def finished(folder: Path, model: Path, rows: list[dict[str, Any]], **settings: Any) -> Config:
    """A run that is prepared for real, scored on paper, and selected."""
    pool = folder / "pool.jsonl"
    pool.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(model)},
            "data": {"train": [str(pool)], "max_length": 64},
        }
        | settings
    )
    run = Path(config.run_dir)
    run_prepare(config, run)
    (run / "scores").mkdir()
    pq.write_table(arrow_table(len(rows)), run / "scores/table.parquet")
    run_select(config, run)
    return config


@pytest.mark.parametrize("style", FORMATS)
def test_the_chosen_rows_given_back_as_training_data_are_the_same_samples(
    tmp_path: Path, tiny_model: Path, style: str
) -> None:
    rows = [
        FORMATS[style](f"what is the color {i}?", f"blue, \u201cmostly\u201d \u2028 {i}")
        | {"mine": {"id": i, "tags": ["a", None]}}
        for i in range(N)
    ]
    config = finished(tmp_path, tiny_model, rows, select={"budget": 10, "order": "pool"})
    folder = Path(config.run_dir) / "selection"
    chosen = [
        json.loads(line)
        for line in (folder / "selected.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    table = pq.read_table(folder / "selection.parquet").to_pandas()
    ids = table[table["selected"]]["sample_id"].tolist()
    assert chosen == [rows[i] for i in ids] and len(ids) == 10
    again = Config.model_validate(
        {"run_dir": str(tmp_path / "again"), "model": {"path": str(tiny_model)}}
        | {"data": {"train": [str(folder / "selected.jsonl")], "max_length": 64}}
    )
    run_prepare(again, tmp_path / "again")
    before, after = (
        load_from_disk(str(run / "prepared/pool"))
        for run in (Path(config.run_dir), tmp_path / "again")
    )
    assert after["input_ids"][:] == before.select(ids)["input_ids"][:]
    assert after["labels"][:] == before.select(ids)["labels"][:]


@pytest.mark.parametrize("weights", ["inverse_density", "preference"])
def test_sft_counts_each_sample_by_the_weight_it_was_given(
    tmp_path: Path, tiny_model: Path, weights: str
) -> None:
    rows = [FORMATS["alpaca"](f"what is {i}?", "blue " * (i % 7 + 1)) for i in range(N)]
    config = finished(
        tmp_path,
        tiny_model,
        rows,
        select={"budget": 10, "region": "sample", "weights": weights, "order": "shuffled"},
        sft={"weights": True},
    )
    run = Path(config.run_dir)
    trained, _ = training_rows(config, run, "selected")
    table = pq.read_table(run / "selection/selection.parquet").to_pandas()
    table = table[table["selected"]]
    assert len(set(table["weight"])) > 5
    assert np.mean(trained["weight"]) == pytest.approx(1)
    pool = load_from_disk(str(run / "prepared/pool"))
    assert trained["input_ids"][:] == pool.select(table["sample_id"].tolist())["input_ids"][:]
    np.testing.assert_array_equal(trained["weight"][:], table["weight"])
