"""The probe: a preliminary training phase, then every pool sample's own gradient norms, recorded on
frozen weights.

Reads `prepared/pool` and the model; writes `probe/model` (when there is a preliminary phase),
`scores/` and TensorBoard curves and histograms. Run by `grads-ds probe CONFIG` or `deepspeed
--hostfile H --module grads_ds probe CONFIG`.
"""

from __future__ import annotations

import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk
from torch.utils.tensorboard import SummaryWriter

from grads_ds import ranks, scores
from grads_ds.agreement import check_hosts_agree, hub_commit
from grads_ds.callback import GradNormCallback
from grads_ds.config import Config
from grads_ds.data.batches import BatchPlan, deal_batches, plan_batches
from grads_ds.reduction import all_reduce_sum, how
from grads_ds.run_dir import package_versions, publish_json, source_commit
from grads_ds.scoring import lengths_of, score_plan
from grads_ds.train import optimizer_steps, train_model

# no score depends on them
_NOT_INPUTS = ("flush_seconds", "tokens_per_microbatch", "checkpoint_steps", "checkpoints_kept")
# pools up to this size are also all-reduced in memory, as a second opinion on the merged table
DENSE_ROWS = 4_000_000


def run_preliminary_training(config: Config, run_dir: Path) -> None:
    """Train on the whole pool for `probe.epochs` and write `probe/model`. Every rank calls this.

    With `probe.record: during` each sample's norms are those at the step that first saw it; samples
    that training did not reach are scored afterwards, and the table is complete when this returns.
    """
    pool_dir, model_dir, folder = (
        run_dir / "prepared/pool",
        run_dir / "probe/model",
        run_dir / "scores",
    )
    pool = load_from_disk(str(pool_dir))
    steps = optimizer_steps(len(pool), config.probe)
    callbacks, recording = [], None
    if config.probe.record == "during":
        recording = recording_of(config, run_dir, config.model.path)
        callbacks = [
            GradNormCallback(
                folder,
                pool,
                config.probe.layers,
                loss_reduction=config.probe.loss_reduction,
                flush_seconds=config.probe.flush_seconds,
                recording=recording,
                merge=False,
            )
        ]
    else:
        check_hosts_agree({"data": pool_dir, "model": config.model.path})
        # a training that begins anew makes another model: what was scored with the last one is void
        ranks.from_main(
            lambda: None if (run_dir / "probe/checkpoints").exists() else _discard(folder)
        )
    # what the model there was trained with, while its recording is not finished
    done_file = run_dir / "probe/trained.json"
    if (
        recording is None
        or ranks.from_main(lambda: _trained_with(done_file, model_dir)) != recording.key
    ):
        train_model(
            config,
            config.probe,
            pool.select_columns(["input_ids", "labels"]),
            config.model.path,
            model_dir,
            run_dir / "probe/checkpoints",
            run_dir / "tensorboard/probe",
            steps,
            what="preliminary training",
            callbacks=callbacks,
        )
    if recording is not None:
        key = recording.key
        ranks.from_main(lambda: publish_json(done_file, {"key": key}))
        record_remaining(config, run_dir, recording, str(model_dir), step=steps)
        ranks.from_main(done_file.unlink)


def run_recording(config: Config, run_dir: Path) -> None:
    """Score every pool sample that no finished part holds yet, then merge and check.

    Every rank calls this.
    """
    model_path = str(run_dir / "probe/model") if config.probe.epochs > 0 else config.model.path
    if "early" in config.probe.extras:
        earlier = config.model_copy(
            update={"probe": config.probe.model_copy(update={"extras": []})}
        )
        recording = recording_of(earlier, run_dir, config.model.path)
        record_remaining(
            earlier, run_dir, recording, config.model.path, folder=run_dir / "scores/early"
        )
    recording = recording_of(config, run_dir, model_path)
    record_remaining(config, run_dir, recording, model_path)


def recording_of(config: Config, run_dir: Path, model_path: str) -> scores.Recording:
    """What the scores depend on and how this start makes them. Raises UserError where hosts differ.

    Every rank calls this.
    """
    pool_dir = run_dir / "prepared/pool"
    extras = config.probe.extras
    anchor: dict[str, str | Path] = (
        {"anchor": run_dir / "prepared" / config.anchor_set()} if "anchor" in extras else {}
    )
    facts = check_hosts_agree({"data": pool_dir, "model": model_path, **anchor})
    during = config.probe.record == "during" and config.probe.epochs > 0
    model = config.model.model_dump(
        mode="json", include={"dtype", "attention", "trust_remote_code"}
    )
    probe = config.probe.model_dump(
        mode="json", include=None if during else {"layers", "loss_reduction"}
    )
    inputs = {
        "model": model_path,
        "model files": facts[f"model {model_path}"],
        "pool": facts[f"data {pool_dir}"],
        **{f"model.{name}": value for name, value in model.items()},
        **{f"probe.{name}": value for name, value in probe.items() if name not in _NOT_INPUTS},
    }
    if extras:
        inputs |= {
            "probe.extras": sorted(extras),
            "model before": config.model.path if "early" in extras else None,
        }
        inputs |= {what: facts[f"{what} {path}"] for what, path in anchor.items()}
    if during:
        inputs |= {"seed": config.seed, "model.lora": config.model.model_dump(mode="json")["lora"]}
        inputs["deepspeed"] = config.deepspeed_json()
    start = {
        "ranks": ranks.world(),
        "hosts": sorted(set(ranks.gather(platform.node()))),
        "versions": package_versions(),
        "code": facts["code of grads_ds"],
        "source_commit": ranks.from_main(source_commit),
    }
    return scores.Recording(inputs, start)


def _trained_with(done_file: Path, model_dir: Path) -> str | None:
    try:
        return str(json.loads(done_file.read_text())["key"]) if model_dir.is_dir() else None
    except (OSError, ValueError, KeyError):
        return None


def _discard(folder: Path) -> None:
    parts = list(folder.glob("part-*.parquet"))
    for file in parts:
        file.unlink()
    if parts:
        print(f"scores: {len(parts)} parts of the earlier model removed", flush=True)


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
        from grads_ds.extras import Extras, extra_columns

        names = [*norm_names, *extra_columns(config)]
        beside = partial(Extras, config, run_dir, recording.key)
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
        "reduced_by": how(),
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
        table = pq.read_table(table_file, columns=["sample_id", *names])
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
    table = pq.read_table(folder / "table.parquet")
    with SummaryWriter(str(log_dir)) as writer:
        for name in names:
            values = table[name].to_numpy()
            values = values[np.isfinite(values)]
            if len(values):
                writer.add_histogram(f"scores/{name}", values)
                writer.add_scalar(f"scores/{name}_median", float(np.median(values)))
