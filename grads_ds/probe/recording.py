"""Score every sample that is not scored yet, write the parts, merge them into the table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import load_from_disk
from torch.utils.tensorboard import SummaryWriter

from grads_ds import scores
from grads_ds.config.columns import TOKEN_LOSSES, extra_columns, norm_columns
from grads_ds.config.config import Config
from grads_ds.data.batches import BatchPlan, deal_batches, plan_batches
from grads_ds.distributed import ranks
from grads_ds.distributed.host_consistency import hub_commit
from grads_ds.distributed.reduction import all_reduce_sum, reduction_backend
from grads_ds.engine.fitting import tokens_that_fit
from grads_ds.engine.frozen_pass import lengths_of, score_plan
from grads_ds.gradnorm import GradNorms
from grads_ds.probe.dense_check import DenseCheck
from grads_ds.scores.read import arrow_table


@dataclass(frozen=True)
class Pass:
    """One table to be recorded: the rows of `rows_dir` scored with the model at `model_path` into
    `folder`.

    `step`: what rows of a table recorded while training carry. `references`: the recording key of
    the reference directions (default: this recording's own).
    """

    config: Config
    run_dir: Path
    recording: scores.Recording
    model_path: str
    rows_dir: str = "prepared/pool"
    folder: str = "scores"
    step: int | None = None
    references: str | None = None

    @property
    def path(self) -> Path:
        """The folder of the table."""
        return self.run_dir / self.folder

    @property
    def norms(self) -> list[str]:
        """Names of the norm columns."""
        return norm_columns(self.config.probe.layers)

    @property
    def extras(self) -> list[str]:
        """Names of the extra columns."""
        return extra_columns(self.config.probe.extras, self.config.probe.layers)

    @property
    def log_dir(self) -> Path | None:
        """Where TensorBoard looks; the run's own table alone is shown there."""
        return self.run_dir / "tensorboard/probe" if self.folder == "scores" else None


def record_remaining(job: Pass) -> None:
    """Score what no part of the recording holds, merge, check, publish. Every rank calls this."""
    rows, names = load_from_disk(str(job.run_dir / job.rows_dir)), [*job.norms, *job.extras]
    table_schema = scores.schema(names, with_step=job.step is not None)
    done, earlier, first = ranks.from_main(lambda: _resume(job, table_schema))
    ids, lengths = np.asarray(rows["sample_id"], np.int64), lengths_of(rows)
    budget = job.config.probe.tokens_per_microbatch
    if budget == "auto":
        budget = first.get("tokens_per_microbatch") or _what_fits(job, rows, lengths)
        job = replace(job, config=with_probe(job.config, tokens_per_microbatch=budget))
    # the first start's micro-batches, whatever the number of ranks is now: the same batches give
    # the same bits
    planned_for = first.get("planned_for", ranks.world())
    plan = _plan(job.config, budget, lengths, np.isin(ids, done), planned_for)
    recording = scores.Recording(
        job.recording.inputs,
        job.recording.start | {"planned_for": planned_for, "tokens_per_microbatch": budget},
    )
    writer = scores.PartWriter(
        job.path, ranks.rank(), recording, table_schema, job.config.probe.flush_seconds
    )
    summed = ["loss", *(name for name in names if name != TOKEN_LOSSES)]
    check = DenseCheck(len(ids), summed)
    _score(job, rows, plan, lengths, writer, check)
    counts, sums = all_reduce_sum(writer.totals.counts), all_reduce_sum(writer.totals.sums)
    now = scores.Totals(writer.totals.columns, counts, sums)
    if counts[0] != plan.num_samples:
        raise scores.IncompleteScores(
            f"the ranks scored {counts[0]} samples, wanted {plan.num_samples}"
        )
    ranks.barrier()
    manifest = _manifest(job)
    ranks.from_main(lambda: _merge(job.path, recording.key, ids, manifest, earlier + now))
    check.compare(plan, ids, job.path / "table.parquet")
    if ranks.is_main() and job.log_dir is not None:
        _histograms(job.path, job.log_dir, summed)


def _score(
    job: Pass,
    rows: Any,
    plan: BatchPlan,
    lengths: np.ndarray,
    writer: scores.PartWriter,
    check: DenseCheck,
) -> None:
    """Score the planned batches of `rows` (`lengths` int64 [N]) and hand the results to `writer`
    and `check`.
    """
    probe, beside = job.config.probe, None
    if probe.extras:
        from grads_ds.probe.extra_columns import ExtraColumns

        key = job.references or job.recording.key
        beside = partial(ExtraColumns, job.config, job.run_dir, key)
    named = rows.select_columns(["sample_id", "sample_hash"])
    what = "recording gradient norms" + (
        "" if job.log_dir else f" into {job.path.relative_to(job.run_dir)}"
    )
    try:
        for indices, norms, extras in score_plan(
            job.config,
            job.model_path,
            rows,
            plan,
            lengths,
            probe.layers,
            probe.loss_reduction,
            what,
            job.log_dir,
            beside,
        ):
            samples = {**named[indices], "num_tokens": lengths[indices]}
            values = {name: extras[name] for name in job.extras}
            table = rows_of(samples, norms, job.norms, values, job.step)
            writer.add(table)
            check.add(indices, table)
    finally:
        writer.flush()  # what is scored is kept, also when the user or a failure ends the pass


def rows_of(
    samples: dict[str, Any],
    norms: GradNorms,
    columns: list[str],
    extras: dict[str, Any],
    step: int | None,
) -> pa.Table:
    """A recorder's result as rows of the table; a group that the model does not have is 0.

    Args:
        samples: sample_id, sample_hash and num_tokens, each [B].
        norms: of the same B samples.
        columns: names of the norm columns.
        extras: extra column -> [B].
        step: see `Pass`.
    """
    norms = norms.cpu()
    found = {f"{group}_grad_norm": value.numpy() for group, value in norms.norms.items()}
    zero = np.zeros(len(norms.loss))
    return scores.make_rows(
        samples,
        norms.loss.numpy(),
        norms.num_target_tokens.numpy(),
        {name: found.get(name, zero) for name in columns},
        extras,
        step,
    )


def with_probe(config: Config, **changes: Any) -> Config:
    """The config with other values of section probe."""
    return config.model_copy(update={"probe": config.probe.model_copy(update=changes)})


def _what_fits(job: Pass, rows: Any, lengths: np.ndarray) -> int:
    """The tokens of a micro-batch for `tokens_per_microbatch: auto`. Every rank calls this."""
    longest = rows[int(lengths.argmax())]["input_ids"]
    probe = job.config.probe
    held = len({"anchor", "contrast"} & set(probe.extras))  # reference gradients
    return tokens_that_fit(job.config, job.model_path, longest, probe.layers, held)


def _plan(
    config: Config, budget: int, lengths: np.ndarray, done: np.ndarray, planned_for: int
) -> BatchPlan:
    plan = plan_batches(lengths, planned_for, budget, config.seed)
    if planned_for == ranks.world() and not done.any():
        return plan
    left = [tuple(i for i in batch if not done[i]) for rank in plan.batches for batch in rank]
    return deal_batches(left, lengths, ranks.world(), budget, config.seed)


def _resume(job: Pass, table_schema: pa.Schema) -> tuple[np.ndarray, scores.Totals, dict[str, Any]]:
    replaced = scores.prepare_parts(job.path, job.recording)
    if replaced:
        print(f"scores: {replaced} parts of the earlier table removed", flush=True)
    done, earlier, first = scores.finished(job.path, job.recording.key, table_schema)
    if len(done):
        print(
            f"scores: {len(done):,} samples are scored already; going on with the rest", flush=True
        )
    return done, earlier, first


def _manifest(job: Pass) -> dict[str, Any]:
    """What scores/manifest.json says beyond the table's own numbers. Every rank calls this."""
    start = job.recording.start
    return {
        **job.recording.inputs,
        # of a hub id, as it was read: known for sure only now, which is why the scores' key does
        # not hold it
        "model commit": ranks.from_main(lambda: hub_commit(job.config.model.path)),
        "epochs": job.config.probe.epochs,
        "world_size": ranks.world(),
        "reduced_by": reduction_backend(),
        **{name: start[name] for name in ("hosts", "versions", "code", "source_commit")},
        "config": job.config.model_dump(mode="json"),
    }


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


def _histograms(folder: Path, log_dir: Path, names: list[str]) -> None:
    table = arrow_table(folder / "table.parquet")
    with SummaryWriter(str(log_dir)) as writer:
        for name in names:
            values = table[name].to_numpy()
            values = values[np.isfinite(values)]
            if len(values):
                writer.add_histogram(f"scores/{name}", values)
                writer.add_scalar(f"scores/{name}_median", float(np.median(values)))
