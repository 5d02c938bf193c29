"""How many tokens of a micro-batch fit beside the model: measured, for `tokens_per_microbatch:
auto`.

Scores half of the pool's longest sample and the whole of it, every position a target, and notes the
most memory of each. What a token takes and what is taken anyway follow from the two; the first
micro-batch's own checks are among what is taken. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.distributed import ranks
from grads_ds.distributed.device import device
from grads_ds.engine.device_memory import free_bytes, peak_bytes
from grads_ds.engine.frozen_pass import score_batch
from grads_ds.engine.memory_shares import LARGEST
from grads_ds.engine.model import frozen_model
from grads_ds.gradnorm import GradNormRecorder


def tokens_that_fit(
    config: Config,
    model_path: str | Path,
    longest: Sequence[int],
    layers: str | list[str],
    references: int = 0,
) -> int:
    """The tokens of one micro-batch per rank, padding included, a multiple of the longest sample's.

    Every rank calls this and gets the least of all ranks' answers. Raises UserError where not even
    one sample fits.

    Args:
        config: of the run.
        model_path: the model that is to be scored.
        longest: token ids of the pool's longest sample.
        layers: groups that are recorded.
        references: reference gradients held beside the model, whole and in float32.
    """
    with frozen_model(config, model_path, recompute=True) as (model, engine):
        recorder = GradNormRecorder(
            model, layers=layers, loss_reduction=config.probe.loss_reduction
        )
        recorded = recorder.plan.groups
        held = (
            4
            * references
            * sum(
                getattr(p, "ds_numel", p.numel())
                for name, p in model.named_parameters()
                if name in recorded
            )
        )
        ids = torch.tensor([list(longest)], device=device())
        half = max(1, len(longest) // 2)
        # the first has the checks of a new kind of batch in it
        first = peak_bytes(lambda: score_batch(recorder, engine, _batch(ids)), model)
        some = peak_bytes(lambda: score_batch(recorder, engine, _batch(ids[:, :half])), model)
        more = peak_bytes(lambda: score_batch(recorder, engine, _batch(ids)), model)
        free = free_bytes() - held
    each = max(1.0, (more - some) / max(1, len(longest) - half))
    # the checks are made for one sample, beside the rest of its micro-batch
    taken = max(more, first) - each * len(longest)
    fitting = int((free - taken) / each) // len(longest)
    rows = min(ranks.all_gather_object(min(fitting, max(1, LARGEST // len(longest)))))
    if rows < 1:
        wanted = f"room for one sample of {len(longest):,} tokens beside the model"
        found = f"{free / 2**30:.1f} GiB, where it takes {max(more, first) / 2**30:.1f} GiB"
        fix = "set probe.gradient_checkpointing, use more ranks, or a smaller data.max_length"
        raise UserError(problem("probe.tokens_per_microbatch: auto", wanted, found, fix))
    if ranks.is_main():
        print(
            f"tokens_per_microbatch: auto takes {rows * len(longest):,}, {rows} of the longest"
            f" samples: {each / 2**20:.2f} MiB a token, {free / 2**30:.1f} GiB free",
            flush=True,
        )
    return rows * len(longest)


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
