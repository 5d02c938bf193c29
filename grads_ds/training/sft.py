"""Supervised fine-tuning on what was selected, and on the variants it is compared with.

Reads `prepared/pool`, `selection/` and the base model; writes `sft/model` (the main selection) or
`sft/variants/<name>/model`, and TensorBoard curves. Run by `grads-ds sft CONFIG` or `deepspeed
--hostfile H --module grads_ds sft CONFIG`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import concatenate_datasets, load_from_disk

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.run_dir.layout import (
    adapter_folder,
    checkpoints_folder,
    model_folder,
    selection_folder,
    snapshot_folders,
    token_gates_folder,
)
from grads_ds.training.gated_rows import gated_rows, recorded_losses
from grads_ds.training.model_card import model_card
from grads_ds.training.snapshots import Snapshots, snapshot_steps
from grads_ds.training.train import TrainingJob, optimizer_steps, train_model


def run_sft(config: Config, run_dir: Path, name: str, identity: str) -> None:
    """Fine-tune the base model on one subset ("selected", "full", or a variant); `identity` is the
    digest of what the model depends on.

    Every rank calls this.
    """
    sft = config.sft
    rows, pool = training_rows(config, run_dir, name)
    gates, gate_counts = run_dir / token_gates_folder(name), None
    if sft.token_gate != "none":
        recorded = recorded_losses(config, run_dir, trained_ids(run_dir, name))
        rows, gate_counts = gated_rows(config, rows, gates, identity, recorded)
    watched = (
        load_from_disk(str(run_dir / "prepared" / sft.early_stopping.set))
        if sft.early_stopping
        else None
    )
    model_dir = run_dir / model_folder(name)
    # equal steps: every variant gets the optimizer steps of the whole pool, repeating its rows as
    # needed
    steps = optimizer_steps(pool if sft.equal == "steps" else len(rows), sft)
    shares = {a: run_dir / folder for a, folder in snapshot_folders(config, name).items()}
    job = TrainingJob(
        config,
        sft,
        rows,
        config.model.path,
        model_dir,
        run_dir / checkpoints_folder(f"sft/{name}"),
        run_dir / "tensorboard/sft" / name,
        steps,
        what=f"sft on {name} ({len(rows):,} rows)",
        identity=identity,
        early_stopping=sft.early_stopping,
        held_out=watched,
        packing=sft.packing,
        card=ranks.from_main(
            lambda: model_card(config, run_dir, name, len(rows), steps, gate_counts)
        ),
        adapter_dir=run_dir / adapter_folder(name) if sft.adapter else None,
        sequence=sft.sequence_parallel,
        callbacks=[Snapshots(config, snapshot_steps(shares, steps))] if shares else [],
    )
    train_model(job)
    if ranks.is_main():
        shutil.rmtree(gates, ignore_errors=True)


def training_rows(config: Config, run_dir: Path, name: str) -> tuple[Any, int]:
    """(one subset's rows: input_ids, labels, with `sft.weights` also weight; how many the whole
    pool would give).

    With `sft.replay` general rows are added so that they make up that share, drawn anew in whole
    rounds when there are too few.
    """
    sft, seed = config.sft, config.seed
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    rows, weights = pool.select_columns(["input_ids", "labels"]), np.ones(len(pool))
    if name != "full":
        chosen, weights = chosen_rows(run_dir, name, np.asarray(pool["sample_id"], np.int64))
        rows = rows.select(chosen)
    share = sft.replay / (1 - sft.replay)
    if share:
        general = load_from_disk(str(run_dir / "prepared/replay")).select_columns(
            ["input_ids", "labels"]
        )
        drawn = draw_replay(len(general), max(1, round(share * len(rows))), seed)
        rows = concatenate_datasets([rows, general.select(drawn)])
        weights = np.concatenate([weights, np.ones(len(drawn))])
    if sft.weights:
        rows = rows.add_column("weight", weights)
    return rows, len(pool) + round(share * len(pool))


def trained_ids(run_dir: Path, name: str) -> np.ndarray:
    """The sample ids of a subset's rows of the pool, int64, in the order of `training_rows`."""
    ids = np.asarray(load_from_disk(str(run_dir / "prepared/pool"))["sample_id"], np.int64)
    return ids if name == "full" else ids[chosen_rows(run_dir, name, ids)[0]]


def draw_replay(available: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of `available` rows in a seeded order; each comes once before any comes twice."""
    rounds = -(-wanted // available)
    draws = [np.random.default_rng([seed, n]).permutation(available) for n in range(rounds)]
    return [int(i) for i in np.concatenate(draws)[:wanted]]


def chosen_rows(run_dir: Path, name: str, pool_ids: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(positions in the pool of a subset's rows, in the pool's order; their weights float64)."""
    file = run_dir / selection_folder(name) / "selection.parquet"
    table = pq.read_table(
        file,
        columns=["sample_id", "selected", "weight"],
        filters=[("selected", "=", True)],
        page_checksum_verification=True,
    )
    ids, weights = table["sample_id"].to_numpy(), table["weight"].to_numpy()
    positions = np.flatnonzero(np.isin(pool_ids, ids))
    order = np.argsort(ids)
    place = order[np.searchsorted(ids[order], pool_ids[positions])]
    return [int(i) for i in positions], weights[place].astype(np.float64)
