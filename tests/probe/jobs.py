"""Small probes for the tests: a config of a tiny model and pool, its stages and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from conftest import make_tiny_model, write_rows
from grads_ds.config.config import Config
from grads_ds.flow.execute import execute
from grads_ds.flow.stages import STAGES

ROWS = 41


def make_config(folder: Path, tied: bool = True, **sections: Any) -> Config:
    folder.mkdir(exist_ok=True)
    settings = folder / "zero3.json"
    settings.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    return Config(
        run_dir=str(folder / "run"),
        deepspeed=str(settings),
        model={"path": str(make_tiny_model(folder / "model", tied=tied)), "dtype": "float32"},
        data=sections.pop(
            "data", {"train": [str(write_rows(folder / "pool.jsonl", ROWS))], "max_length": 64}
        ),
        probe={"epochs": 0, "tokens_per_microbatch": 256} | sections.pop("probe", {}),
        **sections,
    )


def stage(name: str, config: Config) -> None:
    execute(next(stage for stage in STAGES if stage.name == name), config)


def table_of(config: Config) -> Any:
    return pq.read_table(Path(config.run_dir) / "scores/table.parquet").to_pandas()


def leave_unfinished(folder: Path, keep: int) -> None:
    """What a killed run leaves: some parts published, a file half written, no table, no record."""
    for file in sorted(folder.glob("part-*.parquet"))[keep:]:
        file.unlink()
    (folder / ".part-00001-bbbb.parquet.99.tmp").write_bytes(b"half")
    (folder / "table.parquet").unlink()
