"""A frozen pass over prepared samples: every sample's loss and gradient norms, on all ranks, in any order of batches.

Reads a prepared data set and a model folder; yields per-sample results to whoever writes them. No optimizer, no weight
gradients, no gradient reduction: under ZeRO-3 the traffic is the parameters' all-gathers alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from grads_ds import ranks
from grads_ds.config import Config
from grads_ds.data.batches import BatchPlan, plan_batches
from grads_ds.data.collate import pad_batch
from grads_ds.engine import device, frozen_model, gather
from grads_ds.gradnorm import GradNormRecorder, GradNorms


def lengths_of(rows: Any) -> np.ndarray:
    """Number of tokens of every sample of a prepared data set, int64 [N], without reading the tokens into Python."""
    import pyarrow.compute as pc

    return pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)


def score_samples(
    config: Config,
    model_path: str | Path,
    rows: Any,
    indices: Sequence[int],
    layers: str | list[str] | tuple[str, ...],
    loss_reduction: str,
    tokens_per_microbatch: int,
    what: str,
) -> Iterator[tuple[list[int], GradNorms]]:
    """Score `rows[indices]` with the model at `model_path`; yields (indices into rows, results) of this rank's micro-batches.

    Every rank must call this with the same arguments and exhaust it: all take the same number of steps (ZeRO-3 runs in
    lockstep), a rank without work scores an empty batch and yields nothing for it.
    """
    indices = list(indices)
    if not indices:
        return
    lengths = lengths_of(rows)[indices]
    plan = plan_batches(lengths, ranks.world(), tokens_per_microbatch, config.seed)
    if ranks.is_main():
        print(f"{what}: {plan.summary()}", flush=True)
    with frozen_model(config, model_path) as (model, engine):
        recorder = GradNormRecorder(model, layers=layers, loss_reduction=loss_reduction, gather=gather)
        for mine in _with_progress(plan, lengths, what):
            batch = [rows[indices[i]] for i in mine]
            tensors = {key: torch.from_numpy(value).to(device()) for key, value in pad_batch(batch, 0).items()}
            norms = recorder.score(tensors)
            release = getattr(engine.optimizer, "release_backward_leftovers", None)
            if release is not None:  # ZeRO-3 keeps the embedding gathered after a backward it did not start
                release()
            if mine:
                yield [indices[i] for i in mine], norms


def _with_progress(plan: BatchPlan, lengths: np.ndarray, what: str) -> Iterator[tuple[int, ...]]:
    batches = plan.batches[ranks.rank()]
    bar = tqdm(total=len(batches), desc=what, unit="step", disable=not ranks.is_main())
    began, tokens = time.monotonic(), 0
    with bar:
        for mine in batches:
            yield mine
            tokens += int(lengths[list(mine)].sum())
            bar.set_postfix_str(f"{tokens * ranks.world() / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update()
