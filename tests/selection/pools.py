"""Small runs made up for the tests: a score table and a prepared pool on disk, as the earlier
stages leave them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds.config.config import Config
from grads_ds.scores.read import ScoreTable, from_arrow
from grads_ds.selection.stage import run_variant


def arrow_table(n: int, seed: int = 0, **columns: Any) -> pa.Table:
    """A plausible score table: log-normal norms that rise with length; `columns` replace or add."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, 400, n)
    base: dict[str, Any] = {
        "sample_id": np.arange(n, dtype=np.int64),
        "sample_hash": [f"h{i}" for i in range(n)],
        "num_tokens": (tokens + 10).astype(np.int32),
        "num_target_tokens": tokens.astype(np.int32),
        "loss": rng.gamma(4.0, 0.5, n).astype(np.float32),
        "embedding_grad_norm": (np.exp(rng.normal(0, 0.6, n)) * tokens**-0.3).astype(np.float32),
        "lm_head_grad_norm": (5 * np.exp(rng.normal(0, 0.4, n))).astype(np.float32),
        "status": ["ok"] * n,
    }
    return pa.table({name: value for name, value in (base | columns).items() if value is not None})


def score_table(n: int, seed: int = 0, **columns: Any) -> ScoreTable:
    return from_arrow(arrow_table(n, seed, **columns))


def user_row(i: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i * i}"},
        ]
    }


def write_run(
    run_dir: Path,
    table: pa.Table,
    rows: list[dict[str, Any]] | None = None,
    kinds: list[str] | None = None,
) -> None:
    """scores/table.parquet and prepared/pool in two files, in the format of
    `datasets.save_to_disk`.
    """
    n = table.num_rows
    rows = rows or [user_row(i) for i in range(n)]
    (run_dir / "scores").mkdir(parents=True)
    pq.write_table(table, run_dir / "scores" / "table.parquet")
    folder = run_dir / "prepared" / "pool"
    folder.mkdir(parents=True)
    pool = pa.table(
        {
            "sample_id": np.arange(n, dtype=np.int64),
            "input_ids": pa.array([[1, 2, 3]] * n, pa.list_(pa.int32())),
            "labels": pa.array([[-100, 2, 3]] * n, pa.list_(pa.int32())),
            "sample_hash": [f"h{i}" for i in range(n)],
            "source": ["big.jsonl" if i % 4 else "small.jsonl" for i in range(n)],
            "row": [json.dumps(row, ensure_ascii=False) for row in rows],
            "metadata": [json.dumps({"kind": kinds[i]} if kinds else {}) for i in range(n)],
        }
    )
    names = []
    for part, (start, stop) in enumerate([(0, n // 2), (n // 2, n)]):
        names.append(f"data-{part:05d}-of-00002.arrow")
        with pa.ipc.new_stream(folder / names[-1], pool.schema) as writer:
            writer.write_table(pool.slice(start, stop - start))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )


def config(run_dir: Path, **select: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"path": "x"},
            "data": {"train": ["x"]},
            "select": select,
        }
    )


def run_select(config: Config, run_dir: Path) -> None:
    """The stage: the main subset and every variant."""
    for name in (None, *config.select.variants):
        run_variant(config, run_dir, name)


def report(folder: Path) -> dict[str, Any]:
    """What selection.json of a selection folder says."""
    return dict(json.loads((folder / "selection.json").read_text()))
