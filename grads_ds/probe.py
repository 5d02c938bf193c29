"""The probe: a preliminary training phase, then every pool sample's own gradient norms, recorded on frozen weights.

Reads `prepared/pool` and the model; writes `probe/model` (when there is a preliminary phase), `scores/` and TensorBoard curves
and histograms. Run by `grads-ds probe CONFIG` or `deepspeed --hostfile H --module grads_ds probe CONFIG`.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from datasets import load_from_disk
from torch.utils.tensorboard import SummaryWriter

from grads_ds import ranks, scores
from grads_ds.config import Config
from grads_ds.engine import device
from grads_ds.run_dir import package_versions, source_commit, unit_id
from grads_ds.scoring import score_samples
from grads_ds.train import optimizer_steps, train_model

DENSE_ROWS = 4_000_000  # pools up to this size are also all-reduced in memory, as a second opinion on the merged table


def run_preliminary_training(config: Config, run_dir: Path) -> None:
    """Train on the whole pool for `probe.epochs` and write `probe/model`. Every rank calls this."""
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    train_model(
        config,
        config.probe,
        pool.select_columns(["input_ids", "labels"]),
        config.model.path,
        run_dir / "probe/model",
        run_dir / "probe/checkpoints",
        run_dir / "tensorboard/probe",
        optimizer_steps(len(pool), config.probe),
        what="preliminary training",
    )


def run_recording(config: Config, run_dir: Path) -> None:
    """Score every pool sample that no finished part holds yet, then merge and check. Every rank calls this."""
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    folder = run_dir / "scores"
    model_path = str(run_dir / "probe/model") if config.probe.epochs > 0 else config.model.path
    key = scores.recording_key(
        {
            "model": config.model.model_dump(mode="json"),
            "probe": config.probe.model_dump(mode="json", include={"layers", "loss_reduction"}),
            "prepare": ranks.from_main(lambda: unit_id(run_dir, "prepare")),
            "training": ranks.from_main(lambda: unit_id(run_dir, "probe/train")) if config.probe.epochs > 0 else None,
        }
    )
    done = ranks.from_main(lambda: _resume(folder, key))
    ids = np.asarray(pool["sample_id"], np.int64)
    remaining = np.flatnonzero(~np.isin(ids, done))
    table_schema = scores.schema(scores.columns(config.probe.layers))
    names = ["loss", *scores.columns(config.probe.layers)]
    writer = scores.PartWriter(folder, ranks.rank(), key, table_schema)
    dense = np.zeros((len(ids), 1 + len(names)), np.float32) if len(ids) <= DENSE_ROWS else None
    count = checksum = 0
    for indices, norms in score_samples(
        config, model_path, pool, remaining.tolist(), config.probe.layers, config.probe.loss_reduction,
        config.probe.tokens_per_microbatch, "recording gradient norms",
    ):  # fmt: skip
        named = {f"{group}_grad_norm": value.cpu().numpy() for group, value in norms.norms.items()}
        named = {name: named.get(name, np.zeros(len(indices))) for name in scores.columns(config.probe.layers)}
        rows = scores.make_rows(
            [pool[i] for i in indices], norms.loss.cpu().numpy(), norms.num_target_tokens.cpu().numpy(), named
        )
        writer.add(rows)
        if dense is not None:
            dense[indices] += [[1.0, *(row[name] for name in names)] for row in rows]
        count += len(rows)
        checksum += sum(row["sample_id"] for row in rows)
    writer.flush()
    total = _sum([count, checksum])
    if total != [len(remaining), int(ids[remaining].sum())]:
        raise scores.IncompleteScores(
            f"the ranks scored {total[0]} samples (id sum {total[1]}), wanted {len(remaining)}"
        )
    ranks.barrier()
    manifest = {
        "model": model_path,
        "layers": config.probe.layers,
        "loss_reduction": config.probe.loss_reduction,
        "epochs": config.probe.epochs,
        "world_size": ranks.world(),
        "hosts": sorted(set(ranks.gather(platform.node()))),
        "versions": package_versions(),
        "source_commit": source_commit() if ranks.is_main() else None,
    }
    ranks.from_main(lambda: (scores.merge(folder, key, ids, manifest), None)[1])
    if dense is not None:
        _check_dense(dense, names, remaining, ids, folder / "table.parquet")
    if ranks.is_main():
        _histograms(folder, run_dir / "tensorboard/probe", names)


def _resume(folder: Path, key: str) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    strangers = scores.clear_other_parts(folder, key)
    if strangers:
        print(f"scores: {strangers} parts of another model, pool or setting removed", flush=True)
    done = scores.finished_ids(folder, key)
    if len(done):
        print(f"scores: {len(done)} samples are scored already; going on with the rest", flush=True)
    return done


def _sum(values: list[int]) -> list[int]:
    total = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(total)
    return [int(value) for value in total]


def _check_dense(dense: np.ndarray, names: list[str], scored: np.ndarray, ids: np.ndarray, table_file: Path) -> None:
    """All-reduce the ranks' in-memory scores and compare them with the merged table, value by value.

    `dense` is float32 [N, 1 + len(names)]: how often a row was scored now, then its values. Rows of earlier starts are only
    in the table.
    """
    total = torch.from_numpy(dense).to(device())
    dist.all_reduce(total)

    def compare() -> None:
        summed = total.cpu().numpy()[scored]
        table = pq.read_table(table_file, columns=["sample_id", *names])
        place = np.searchsorted(table["sample_id"].to_numpy(), ids[scored])
        written = np.stack([table[name].to_numpy()[place] for name in names], axis=1)
        if not (summed[:, 0] == 1).all() or not np.array_equal(summed[:, 1:], written, equal_nan=True):
            raise scores.IncompleteScores(f"{table_file} differs from the ranks' own sums in memory; score again")

    ranks.from_main(compare)


def _histograms(folder: Path, log_dir: Path, names: list[str]) -> None:
    table = pq.read_table(folder / "table.parquet")
    with SummaryWriter(str(log_dir)) as writer:
        for name in names:
            values = table[name].to_numpy()
            values = values[np.isfinite(values)]
            if len(values):
                writer.add_histogram(f"scores/{name}", values)
                writer.add_scalar(f"scores/{name}_median", float(np.median(values)))
