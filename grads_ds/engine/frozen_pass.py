"""A frozen pass over prepared samples: every sample's loss and gradient norms, on all ranks, in any
order of batches.

Reads a prepared data set and a model folder; yields per-sample results to whoever writes them. No
optimizer, no weight gradients, no gradient reduction: under ZeRO-3 the traffic is the parameters'
all-gathers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from grads_ds.config.config import Config
from grads_ds.data.batches import BatchPlan
from grads_ds.data.collate import pad_batch
from grads_ds.distributed import ranks
from grads_ds.distributed.device import device
from grads_ds.distributed.progress import with_progress
from grads_ds.distributed.step_timing import attached, reading
from grads_ds.engine.model import frozen_model
from grads_ds.engine.module_order import release_leftovers
from grads_ds.gradnorm import GradNormRecorder, GradNorms


class ColumnRecorder(Protocol):
    """Scores a micro-batch and records more than its norms: extra columns, float64 [B] each, or a
    list for each of the B samples.
    """

    def score(self, samples: Sequence[Mapping[str, Any]]) -> tuple[GradNorms, dict[str, Any]]: ...


def lengths_of(rows: Any) -> np.ndarray:
    """Number of tokens of every sample of a prepared data set, int64 [N], without reading the
    tokens into Python.
    """
    import pyarrow.compute as pc

    return (
        pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)
    )


def score_plan(
    config: Config,
    model_path: str | Path,
    rows: Any,
    plan: BatchPlan,
    lengths: np.ndarray,
    layers: str | list[str] | tuple[str, ...],
    loss_reduction: str,
    what: str,
    log_dir: Path | None = None,
    beside: Callable[[GradNormRecorder, Any], ColumnRecorder] | None = None,
) -> Iterator[tuple[list[int], GradNorms, dict[str, Any]]]:
    """Score the planned batches of `rows` (`lengths` int64 [N]); yields (indices into rows,
    results, extra columns) of this rank's.

    `beside` makes what records the extra columns, from the recorder and the engine; without it
    there are none.

    All ranks take the same number of steps (ZeRO-3 runs in lockstep): a rank without work scores an
    empty batch and yields nothing for it. Every rank must call this with the same arguments and
    exhaust it.
    """
    if not plan.steps:
        return
    # without layers there is no backward to compute anything again in
    with frozen_model(config, model_path, bool(layers)) as (model, engine):
        recorder = GradNormRecorder(model, layers=layers, loss_reduction=loss_reduction)
        extras = beside(recorder, engine) if beside is not None else None

        def score(samples: Sequence[Mapping[str, Any]]) -> tuple[GradNorms, dict[str, Any]]:
            if extras is not None:
                return extras.score(samples)
            return score_batch(recorder, engine, to_device(samples)), {}

        yield from score_batches(model, rows, plan, lengths, what, score, log_dir)


def score_batches(
    model: Any,
    rows: Any,
    plan: BatchPlan,
    lengths: np.ndarray,
    what: str,
    score: Callable[[Sequence[Mapping[str, Any]]], tuple[GradNorms, dict[str, Any]]],
    log_dir: Path | None = None,
) -> Iterator[tuple[list[int], GradNorms, dict[str, Any]]]:
    """As `score_plan`, with a loaded model and `score`, which makes one micro-batch's results."""
    if not plan.steps:
        return
    if ranks.is_main():
        print(f"{what}: {plan.summary()}", flush=True)
    with attached(model):
        for mine in with_progress(plan, lengths, what, log_dir):
            with reading():
                samples = [rows[i] for i in mine]
            norms, columns = score(samples)
            if mine:
                yield list(mine), norms, columns


def to_device(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Prepared rows as one padded batch of tensors [B, T] where this rank computes."""
    return {
        key: torch.from_numpy(value).to(device()) for key, value in pad_batch(samples, 0).items()
    }


def score_batch(
    recorder: GradNormRecorder, engine: Any, batch: dict[str, torch.Tensor], beside: bool = False
) -> GradNorms:
    """One step of the pass: this rank's micro-batch on the frozen engine.

    Every rank calls this as often as the others. beside: a recorder of losses alone, between
    passes of one with a backward.
    """
    norms = recorder.score(batch)
    release_leftovers(engine, beside)
    return norms
