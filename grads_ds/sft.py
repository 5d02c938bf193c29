"""Supervised fine-tuning on what was selected, and on the variants it is compared with.

Reads `prepared/pool`, `selection/` and the base model; writes `sft/model` (the main selection) or `sft/variants/<name>/model`,
and TensorBoard curves. Run by `grads-ds sft CONFIG` or `deepspeed --hostfile H --module grads_ds sft CONFIG`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import load_from_disk

from grads_ds.config import Config
from grads_ds.stages import model_folder, selection_folder
from grads_ds.train import optimizer_steps, train_model


def run_sft(config: Config, run_dir: Path, name: str) -> None:
    """Fine-tune the base model on one subset ("selected", "full", or a variant). Every rank calls this."""
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    rows = pool.select_columns(["input_ids", "labels"])
    if name != "full":
        rows = rows.select(chosen_rows(run_dir, name, np.asarray(pool["sample_id"], np.int64)))
    work = run_dir / model_folder(name)
    train_model(
        config,
        config.sft,
        rows,
        config.model.path,
        work,
        work.parent / "checkpoints",
        run_dir / "tensorboard/sft" / name,
        # equal steps: every variant gets the optimizer steps of the whole pool, repeating its rows as needed
        optimizer_steps(len(pool) if config.sft.equal == "steps" else len(rows), config.sft),
        what=f"sft on {name} ({len(rows):,} rows)",
    )


def chosen_rows(run_dir: Path, name: str, pool_ids: np.ndarray) -> list[int]:
    """Positions in the pool of a subset's rows, in the pool's order."""
    table = pq.read_table(run_dir / selection_folder(name) / "selection.parquet", columns=["sample_id", "selected"])
    chosen = table["sample_id"].to_numpy()[table["selected"].to_numpy(zero_copy_only=False)]
    return [int(i) for i in np.flatnonzero(np.isin(pool_ids, chosen))]
