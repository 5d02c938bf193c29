"""Score every sample that is not scored yet, write the parts, merge them into the table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk
from torch.utils.tensorboard import SummaryWriter

from grads_ds import scores
from grads_ds.config.config import Config
from grads_ds.data.batches import BatchPlan, deal_batches, plan_batches
from grads_ds.distributed import ranks
from grads_ds.distributed.host_consistency import hub_commit
from grads_ds.distributed.reduction import all_reduce_sum, reduction_backend
from grads_ds.engine.frozen_pass import lengths_of, score_plan

# pools up to this size are also all-reduced in memory, as a second opinion on the merged table
DENSE_ROWS = 4_000_000


def record_remaining(
    config: Config,
    run_dir: Path,
    recording: scores.Recording,
    model_path: str,
    step: int | None = None,
    folder: Path | None = None,
) -> None:
    """Score with the model at `model_path` what no part of `recording` holds, merge, check,
    publish. Every rank calls this.

    `step` is what rows of a table recorded while training carry; `folder` receives the table
    (default: scores/).
    """
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    main = folder is None  # the run's own table, which TensorBoard shows
    folder, probe = folder or run_dir / "scores", config.probe
    log_dir = run_dir / "tensorboard/probe" if main else None
    what = "recording gradient norms" + ("" if main else f" into {folder.name}")
    norm_names, beside = scores.columns(probe.layers), None
    names = norm_names
    if probe.extras:
        from grads_ds.probe.extra_columns import ExtraColumns, extra_columns

        names = [*norm_names, *extra_columns(config)]
        beside = partial(ExtraColumns, config, run_dir, recording.key)
    table_schema = scores.schema(names, with_step=step is not None)
    done, earlier, first = ranks.from_main(lambda: _resume(folder, recording, table_schema))
    ids, lengths = np.asarray(pool["sample_id"], np.int64), lengths_of(pool)
    # the first start's micro-batches, whatever the number of ranks is now: the same batches give
    # the same bits
    planned_for = first.get("planned_for", ranks.world())
    plan = _plan(config, lengths, np.isin(ids, done), planned_for)
    recording = scores.Recording(recording.inputs, recording.start | {"planned_for": planned_for})
    writer = scores.PartWriter(folder, ranks.rank(), recording, table_schema, probe.flush_seconds)
    dense = np.zeros((len(ids), 2 + len(names)), np.float32) if len(ids) <= DENSE_ROWS else None
    try:
        for indices, norms, extras in score_plan(
            config,
            model_path,
            pool,
            plan,
            lengths,
            probe.layers,
            probe.loss_reduction,
            what,
            log_dir,
            beside,
        ):
            named = {
                f"{group}_grad_norm": value.cpu().numpy() for group, value in norms.norms.items()
            }
            named = {name: named.get(name, np.zeros(len(indices))) for name in norm_names}
            targets = norms.num_target_tokens.cpu().numpy()
            rows = scores.make_rows(
                [pool[i] for i in indices], norms.loss.cpu().numpy(), targets, named, extras
            )
            writer.add(rows if step is None else [row | {scores.STEP: step} for row in rows])
            if dense is not None:
                dense[indices] += [
                    [1.0, row["loss"], *(row[name] for name in names)] for row in rows
                ]
    finally:
        writer.flush()  # what is scored is kept, also when the user or a fault ends the pass
    counts, sums = all_reduce_sum(writer.totals.counts), all_reduce_sum(writer.totals.sums)
    now = scores.Totals(writer.totals.columns, counts, sums)
    if counts[0] != plan.num_samples:
        raise scores.IncompleteScores(
            f"the ranks scored {counts[0]} samples, wanted {plan.num_samples}"
        )
    ranks.barrier()
    manifest = {
        **recording.inputs,
        # of a hub id, as it was read: known for sure only now, which is why the scores' key does
        # not hold it
        "model commit": ranks.from_main(lambda: hub_commit(config.model.path)),
        "epochs": probe.epochs,
        "world_size": ranks.world(),
        "reduced_by": reduction_backend(),
        **{name: recording.start[name] for name in ("hosts", "versions", "code", "source_commit")},
        "config": config.model_dump(mode="json"),
    }
    ranks.from_main(lambda: _merge(folder, recording.key, ids, manifest, earlier + now))
    if dense is not None:
        _check_dense(dense, ["loss", *names], plan, ids, folder / "table.parquet")
    if ranks.is_main() and log_dir is not None:
        _histograms(folder, log_dir, ["loss", *names])


def _plan(config: Config, lengths: np.ndarray, done: np.ndarray, planned_for: int) -> BatchPlan:
    budget = config.probe.tokens_per_microbatch
    plan = plan_batches(lengths, planned_for, budget, config.seed)
    if planned_for == ranks.world() and not done.any():
        return plan
    left = [tuple(i for i in batch if not done[i]) for rank in plan.batches for batch in rank]
    return deal_batches(left, lengths, ranks.world(), budget, config.seed)


def _resume(
    folder: Path, recording: scores.Recording, table_schema: pa.Schema
) -> tuple[np.ndarray, scores.Totals, dict[str, Any]]:
    replaced = scores.prepare_parts(folder, recording)
    if replaced:
        print(f"scores: {replaced} parts of the earlier table removed", flush=True)
    done, earlier, first = scores.finished(folder, recording.key, table_schema)
    if len(done):
        print(
            f"scores: {len(done):,} samples are scored already; going on with the rest", flush=True
        )
    return done, earlier, first


def _merge(
    folder: Path, key: str, ids: np.ndarray, manifest: dict[str, Any], expected: scores.Totals
) -> None:
    totals = scores.merge(folder, key, ids, manifest, expected)
    flagged = ", ".join(
        f"{count:,} {status}"
        for status, count in totals.status().items()
        if count and status != "ok"
    )
    print(
        f"scores: {int(totals.counts[0]):,} samples, each once{f' ({flagged})' if flagged else ''}",
        flush=True,
    )


def _check_dense(
    dense: np.ndarray, names: list[str], plan: BatchPlan, ids: np.ndarray, table_file: Path
) -> None:
    """All-reduce the ranks' in-memory scores and compare them with the merged table, value by
    value.

    `dense` is float32 [N, 1 + len(names)]: how often a row was scored now, then its values. Rows of
    earlier starts are only in the table.
    """
    total = all_reduce_sum(dense)

    def compare() -> None:
        scored = np.array(
            sorted(i for rank in plan.batches for batch in rank for i in batch), np.int64
        )
        summed = total[scored]
        table = pq.read_table(
            table_file, columns=["sample_id", *names], page_checksum_verification=True
        )
        place = np.searchsorted(table["sample_id"].to_numpy(), ids[scored])
        written = np.stack([table[name].to_numpy()[place] for name in names], axis=1)
        if not (summed[:, 0] == 1).all() or not np.array_equal(
            summed[:, 1:], written, equal_nan=True
        ):
            table_file.unlink()
            raise scores.IncompleteScores(
                f"{table_file} differed from the ranks' own scores in memory and was removed; look"
                f" at the disk, then remove {table_file.parent} and score again"
            )

    ranks.from_main(compare)


def _histograms(folder: Path, log_dir: Path, names: list[str]) -> None:
    table = pq.read_table(folder / "table.parquet", page_checksum_verification=True)
    with SummaryWriter(str(log_dir)) as writer:
        for name in names:
            values = table[name].to_numpy()
            values = values[np.isfinite(values)]
            if len(values):
                writer.add_histogram(f"scores/{name}", values)
                writer.add_scalar(f"scores/{name}_median", float(np.median(values)))
