"""What the base model says of the target tokens that are about to be trained on: one frozen pass
over them, under the engine of the training.

Reads the training rows and the base model; writes parts, which a restart goes on from, into a
folder that its caller removes. The micro-batches do not depend on the number of ranks, so that the
values do not either.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from grads_ds.config.config import Config
from grads_ds.data.batches import deal_batches, plan_batches
from grads_ds.distributed import ranks
from grads_ds.engine.frozen_pass import lengths_of, score_batch, score_plan, to_device
from grads_ds.gradnorm import GradNormRecorder, GradNorms
from grads_ds.gradnorm.formulas.head import DEFAULT_BUDGET
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.run_dir.digests import DIGITS, sha256_once
from grads_ds.run_dir.publish import atomic_path
from grads_ds.training.token_gates import EAFT_TOKENS, BaseTokens

FLUSH_SECONDS = 60.0  # work that a killed rank loses, at most
_SCHEMA = pa.schema(
    [("row", pa.int64()), ("losses", pa.list_(pa.float32())), ("entropies", pa.list_(pa.float32()))]
)


def score_base(config: Config, rows: Any, folder: Path, what: str, entropies: bool) -> None:
    """Score all `rows` with the base model into parts in `folder`. Every rank calls this.

    Rows that a whole part holds already are not scored again.
    """
    # forwards alone, as in an evaluation
    lengths, budget = lengths_of(rows), config.evaluate.tokens_per_microbatch
    done = np.isin(np.arange(len(lengths)), ranks.from_main(lambda: _finished(folder)))
    planned = plan_batches(lengths, 1, budget, config.seed).batches[0]
    left = [tuple(row for row in batch if not done[row]) for batch in planned]
    plan = deal_batches(left, lengths, ranks.world(), budget, config.seed)
    collected: list[dict[str, Any]] = []
    last = time.monotonic()
    try:
        for mine, _, values in score_plan(
            config,
            config.model.path,
            rows,
            plan,
            lengths,
            (),
            "mean",
            what,
            beside=lambda recorder, engine: _TokenRecorder(recorder, engine, entropies),
        ):
            collected.append({"row": mine, **values})
            if time.monotonic() - last > FLUSH_SECONDS:
                _publish(folder, collected)
                collected, last = [], time.monotonic()
    finally:
        _publish(folder, collected)  # what is scored is kept, also when a failure ends the pass
    ranks.barrier()


class _TokenRecorder:
    """Scores a micro-batch; columns: object [B], each sample's float32 [its targets]."""

    def __init__(self, recorder: GradNormRecorder, engine: Any, entropies: bool) -> None:
        self.engine, self.entropies = engine, entropies
        self.recorder = GradNormRecorder(recorder.model, (), gather=recorder.gather, tokens=True)

    def score(
        self, samples: Sequence[Mapping[str, Any]]
    ) -> tuple[GradNorms, dict[str, np.ndarray]]:
        batch = to_device(samples)
        found: list[np.ndarray] = []
        with self.recorder.observing() as views:
            norms = score_batch(self.recorder, self.engine, batch)
            if self.entropies:
                with views[0].whole():
                    for view in views:
                        values = _array(target_entropies(view, EAFT_TOKENS))
                        found += [values[a:b] for a, b in view.layout.split_targets()]
        assert norms.tokens is not None
        losses = [_array(row[~row.isnan()]) for row in norms.tokens.loss]
        found = found or [np.zeros(0, np.float32) for _ in losses]
        return norms, {"losses": _objects(losses), "entropies": _objects(found)}


def target_entropies(view: HeadView, tokens: int, budget: int = DEFAULT_BUDGET) -> Tensor:
    """The entropy (nats) of the `tokens` likeliest tokens, renormalised, at each target position,
    float64 [N]. The head has to be whole; at most `budget` logits are held at a time.
    """
    rows_ND, weight_VD, bias_V, transform = view.at_targets()
    vocabulary = rows_ND.shape[1] if weight_VD is None else len(weight_VD)
    found = []
    for rows_nD in rows_ND.split(max(1, budget // vocabulary)):
        z_nV = accurate(rows_nD)
        if weight_VD is not None:
            z_nV = z_nV @ weight_VD.to(z_nV.dtype).T
            z_nV = transform.apply(z_nV if bias_V is None else z_nV + bias_V.to(z_nV.dtype))
        log_p = z_nV.topk(min(tokens, vocabulary), dim=-1).values.double().log_softmax(-1)
        found.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(found) if found else rows_ND.new_zeros(0, dtype=torch.float64)


def accurate(values: Tensor) -> Tensor:
    """In float32, or float64 where they are in it already; never the tensor itself changed."""
    return values if values.dtype == torch.float64 else values.float()


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _objects(values: list[np.ndarray]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out


# ---- parts ---------------------------------------------------------------------------------------


def _publish(folder: Path, collected: list[dict[str, Any]]) -> None:
    if not collected:
        return
    columns = {
        name: [value for part in collected for value in part[name]] for name in _SCHEMA.names
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, _SCHEMA), sink)
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()[:DIGITS]
    with atomic_path(folder / f"part-{digest}.parquet") as aside:
        aside.write_bytes(content)


def _finished(folder: Path) -> np.ndarray:
    """Rows that whole parts hold, int64; a damaged part is removed, and says so."""
    rows = [np.zeros(0, np.int64)]
    for file in sorted(folder.glob("part-*.parquet")):
        if file.stem.removeprefix("part-") != sha256_once(file)[:DIGITS]:
            print(f"{file}: damaged; removed, its rows are scored again", flush=True)
            file.unlink()
            continue
        rows.append(pq.read_table(file, columns=["row"])["row"].to_numpy())
    found = np.concatenate(rows)
    if len(found):
        print(f"token gate: {len(found):,} rows are scored already", flush=True)
    return found


def read_base(folder: Path, rows: int, entropies: bool) -> BaseTokens:
    """What the parts in `folder` say of all `rows` rows."""
    tables = [pq.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    whole = pa.concat_tables(tables).sort_by("row").combine_chunks()
    found = whole["row"].to_numpy()
    if not np.array_equal(found, np.arange(rows)):
        raise RuntimeError(f"{folder}: {len(found):,} rows were scored, wanted {rows:,} once each")
    losses = whole["losses"].combine_chunks()
    starts = losses.offsets.to_numpy().astype(np.int64)
    values = losses.values.to_numpy(zero_copy_only=False)
    of_entropy = whole["entropies"].combine_chunks().values.to_numpy(zero_copy_only=False)
    return BaseTokens(values, of_entropy if entropies else None, starts)
