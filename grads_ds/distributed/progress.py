"""How a pass over planned micro-batches is getting on, over all ranks that go in step (those of one
host where each host has the parameters to itself): rates, time left, padding, who lags behind.

Prints one progress bar on rank 0 and writes TensorBoard scalars where a folder is given.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from grads_ds.data.batches import BatchPlan
from grads_ds.distributed import heartbeat, ranks
from grads_ds.distributed.device import device
from grads_ds.distributed.host_group import sign_of_life

LOOKS = 100  # how often the ranks compare notes in one pass: a tiny all-gather each time


def with_progress(
    plan: BatchPlan, lengths: np.ndarray, what: str, log_dir: Path | None = None
) -> Iterator[tuple[int, ...]]:
    """This rank's micro-batches, one by one. Every rank must exhaust it.

    The bar counts tokens with their padding, which the work goes by: steps run from the costliest
    to the cheapest.
    """
    batches, together = plan.batches[ranks.rank()], ranks.in_step()
    if len(together) < ranks.world():
        what += f" (of {len(together)} ranks that go in step)"
    every = max(1, len(batches) // LOOKS)
    longest = np.array([lengths[list(batch)].max() if batch else 0 for batch in batches], np.int64)
    all_padded = sum(
        len(batch) * int(lengths[list(batch)].max())
        for rank in together
        for batch in plan.batches[rank]
        if batch
    )
    main = ranks.is_main()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=all_padded, desc=what, unit="tok", unit_scale=True, disable=not main)
        )
        writer = SummaryWriter(str(log_dir)) if main and log_dir is not None else None
        if writer is not None:
            stack.callback(writer.close)
        began = looked = time.monotonic()
        mine = np.zeros(4)  # samples, tokens, tokens with padding, seconds since the last look
        before = np.zeros(3)
        for step, batch in enumerate(batches):
            heartbeat.beat(what, step, len(batches))
            sign_of_life()
            yield batch
            mine[:3] += len(batch), lengths[list(batch)].sum(), len(batch) * longest[step]
            if (step + 1) % every and step + 1 < len(batches):
                continue
            mine[3] = time.monotonic() - looked
            notes = _all(mine)
            samples, tokens, padded = notes[:, :3].sum(0)
            now = time.monotonic()
            if main:
                slowest, lag = together[int(notes[:, 3].argmax())], float(np.ptp(notes[:, 3]))
                span, since = max(now - began, 1e-9), max(now - looked, 1e-9)
                bar.set_postfix_str(
                    f"{samples:,.0f} samples, {samples / span:,.1f}/s, padding"
                    f" {1 - tokens / max(padded, 1):.1%}, rank {slowest} last by {lag:.2f} s",
                    refresh=False,
                )
                bar.update(int(padded - before[2]))
                if writer is not None:
                    rates = (np.array([samples, tokens]) - before[:2]) / since
                    for name, value in (
                        ("samples_per_second", rates[0]),
                        ("tokens_per_second", rates[1]),
                        ("padding", 1 - tokens / max(padded, 1)),
                        ("lag_seconds", lag),
                    ):
                        writer.add_scalar(f"scoring/{name}", float(value), int(samples))
            before, looked = np.array([samples, tokens, padded]), now


def _all(mine: np.ndarray) -> np.ndarray:
    """The float64 [4] of every rank that goes in step, as [ranks, 4]."""
    together = ranks.in_step()
    if len(together) == 1:
        return mine[None]
    tensor = torch.from_numpy(mine).to(device())
    every = [torch.empty_like(tensor) for _ in together]
    torch.distributed.all_gather(every, tensor)
    return torch.stack(every).cpu().numpy()
