"""Training rows -> the same rows, each target token with its weight under `sft.token_gate`.

Reads the base model's losses where the probe recorded them, else runs one pass of the base model
over the rows; writes the weights (and the pass's parts) into the folder given, which the training
removes at its end.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from grads_ds.config.columns import TOKEN_LOSSES
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.distributed import ranks
from grads_ds.run_dir.publish import atomic_path
from grads_ds.scores.read import arrow_table
from grads_ds.scores.token_losses import read_token_losses
from grads_ds.training.base_tokens import read_base, score_base
from grads_ds.training.token_gates import BaseTokens, GateCounts, open_gates

BATCH = 1000  # rows whose weights are written at a time


@dataclass(frozen=True)
class GatedRows:
    """Rows by index, each with a weight for each of its tokens: two files, both read in place."""

    rows: Any
    weights: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.rows[row], **self.weights[row]}


def gated_rows(
    config: Config, rows: Any, folder: Path, identity: str, recorded: BaseTokens | None = None
) -> tuple[GatedRows, GateCounts]:
    """(`rows` with their tokens' weights, what the gate did).

    Every rank calls this. Raises UserError where the gate leaves no target token that counts.

    Args:
        config: the run's; `sft.token_gate` is not none.
        rows: input_ids, labels and, where samples count differently, weight.
        folder: for the parts of the pass, and the weights.
        identity: what the training depends on; parts of another are removed.
        recorded: the base model's losses, where they are known; then there is no pass.
    """
    gate, own = config.sft.token_gate, folder / identity
    ranks.from_main(lambda: _prepare(folder, identity))
    entropies = gate == "eaft"
    if recorded is None:
        score_base(config, rows, own, f"base model, for token gate {gate}", entropies)
    file = own / "weights.arrow"
    counts = ranks.from_main(
        lambda: _write(rows, gate, recorded or read_base(own, len(rows), entropies), file)
    )
    if ranks.is_main():
        print(f"sft: {counts}", flush=True)
    return GatedRows(rows, Dataset.from_file(str(file))), counts


def recorded_losses(config: Config, run_dir: Path, sample_ids: np.ndarray) -> BaseTokens | None:
    """What the probe recorded of pool rows (ids int64 [N]) when it scored the base model itself,
    where that is all the gate needs: every token's loss (`probe.extras: [token_losses]`), or for
    flow each row's mean in the place of its tokens'.
    """
    gate, probe = config.sft.token_gate, config.probe
    if gate == "eaft" or probe.epochs > 0 or config.sft.replay:
        return None
    if TOKEN_LOSSES in probe.extras:
        found = read_token_losses(run_dir / "scores", sample_ids.tolist())
        rows = [found.get(int(i), np.zeros(0)) for i in sample_ids]
        counts = np.array([len(row) for row in rows], np.int64)
        losses = np.concatenate([*rows, np.zeros(0)])
    elif gate == "flow":
        columns = ["sample_id", "loss", "num_target_tokens"]
        table = arrow_table(run_dir / "scores/table.parquet", columns)
        places = np.searchsorted(table["sample_id"].to_numpy(), sample_ids)
        counts = table["num_target_tokens"].to_numpy()[places].astype(np.int64)
        means = table["loss"].to_numpy()[places]
        if probe.loss_reduction == "sum":
            means = means / np.maximum(counts, 1)
        losses = np.repeat(means, counts)
    else:
        return None
    return BaseTokens(losses.astype(np.float32), None, np.concatenate([[0], counts.cumsum()]))


def _prepare(folder: Path, identity: str) -> None:
    for other in folder.iterdir() if folder.exists() else ():
        if other.name != identity:
            shutil.rmtree(other)
    (folder / identity).mkdir(parents=True, exist_ok=True)


def _write(rows: Any, gate: str, base: BaseTokens, file: Path) -> GateCounts:
    if unscorable := int((~np.isfinite(base.losses)).sum()):
        raise UserError(
            problem(
                "sft.token_gate",
                "a base model with a finite loss at every target token",
                f"{unscorable:,} of {len(base.losses):,} tokens without one",
                "look for broken weights, use model.dtype bfloat16 or float32, or set it to none",
            )
        )
    values, counts = open_gates(gate, base)
    total = 0.0
    features = Features({"weight": List(Value("float32"))})
    with atomic_path(file) as aside, ArrowWriter(features=features, path=str(aside)) as writer:
        for first in range(0, len(rows), BATCH):
            last = min(len(rows), first + BATCH)
            part = values[base.starts[first] : base.starts[last]]
            weights = _placed(rows.with_format("arrow")[first:last], part)
            total += float(weights.values.to_numpy().sum(dtype=np.float64))
            writer.write_table(pa.table({"weight": weights}, features.arrow_schema))
        writer.finalize()
    if not total > 0:
        raise UserError(
            problem(
                "sft.token_gate",
                f"target tokens that count under {gate}",
                f"none of {counts.targets:,} in {counts.rows:,} rows",
                "choose another gate, or rows that the base model finds likelier",
            )
        )
    return counts


def _placed(rows: pa.Table, values: np.ndarray) -> pa.ListArray:
    """The weights of some rows by token: at each target its gate in `values` times the row's own
    weight, 0 elsewhere. A sample's first token is no target: nothing of its own predicts it.
    """
    labels = rows["labels"].combine_chunks()
    offsets = labels.offsets.to_numpy().astype(np.int64)
    flat = labels.values.to_numpy()[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    targets = flat != IGNORE_INDEX
    targets[offsets[:-1]] = False
    own = rows["weight"].to_numpy() if "weight" in rows.column_names else np.ones(len(rows))
    weights = np.zeros(len(flat), np.float32)
    weights[targets] = values * np.repeat(own, np.diff(offsets))[targets]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(weights))
