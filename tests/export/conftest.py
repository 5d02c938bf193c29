"""A finished selection to export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tests.export.subsets import ROWS, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "selection").mkdir(parents=True)
    write(folder, ROWS)
    pool = [
        {"sample_id": n, "input_ids": [n + 5] * (n + 2), "labels": [-100] * (n + 2)}
        for n in range(6)
    ]
    Dataset.from_list(pool).save_to_disk(str(folder / "prepared/pool"))
    table = pa.table(
        {"sample_id": np.arange(6), "selected": np.array([True, False, False, True, True, False])}
    )
    pq.write_table(table, folder / "selection/selection.parquet")
    return folder
