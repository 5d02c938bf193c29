"""One loaded model's pass over one set: every target's loss, and at some targets the divergence
from the base model.

With p the base model's and q the trained model's distribution over the next token after the same
context, KL(p || q) = sum_v p_v (log p_v - log q_v), in nats. Of the base model the inputs of its
head at those targets are kept ([n, D], host memory, each rank its own rows), and its head once: its
logits are one product away, and its body runs once for a set however many models follow. Every rank
calls `pass_over` with the same arguments.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grads_ds.config.config import Config
from grads_ds.data.batches import plan_batches
from grads_ds.distributed import heartbeat, ranks
from grads_ds.distributed.device import device
from grads_ds.engine.frozen_pass import score_batch, score_batches, to_device
from grads_ds.engine.model import frozen_model
from grads_ds.evaluate.measured_sets import MeasuredSet
from grads_ds.gradnorm import GradNormRecorder, GradNorms
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.statistics import Floats, Ints

LOGITS = 2**25  # held at a time, twice


@dataclass(frozen=True)
class Head:
    """What makes logits [n, V] of rows: weight [V, D] and bias [V]; without a weight the rows are
    logits.
    """

    weight: Tensor | None
    bias: Tensor | None
    transform: LogitTransform

    def logits(self, rows: Tensor, columns: int = 2**14) -> Tensor:
        """Float32 (float64 of float64) logits where the rows are; the weight may lie elsewhere and
        comes in parts of `columns` rows.
        """
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        if self.weight is None:
            return rows.to(dtype)
        rows, parts = rows.to(dtype), []
        for part in self.weight.split(columns):
            parts.append(rows @ part.to(rows.device, dtype).T)
        out = torch.cat(parts, -1)
        if self.bias is not None:
            out += self.bias.to(rows.device, dtype)
        return self.transform.apply(out)


@dataclass(frozen=True)
class BaseStream:
    """This rank's rows of the base model's pass over a set, in the order of the pass, host
    memory.
    """

    rows: Tensor
    head: Head


@dataclass(frozen=True)
class SetResult:
    """Of each of the N rows, the same on every rank: mean loss over its targets (nats), targets,
    summed divergence and at how many targets it was taken; token_losses: every target's, float32.
    kl_seconds: what the divergence took this rank.
    """

    loss: Floats
    targets: Ints
    kl_sum: Floats
    kl_positions: Ints
    token_losses: list[np.ndarray]
    kl_seconds: float


class TargetReader:
    """A loaded model that is read set after set: scores micro-batches, and keeps the head's inputs
    at the places asked for.
    """

    def __init__(self, model: Any, engine: Any, recorder: GradNormRecorder) -> None:
        self.model, self.engine, self.recorder = model, engine, recorder
        self.views: list[HeadView] = []
        self.host_head: Head | None = None  # once for all sets

    def score(self, samples: Sequence[Mapping[str, Any]]) -> tuple[GradNorms, dict[str, Any]]:
        """The micro-batch's losses; what the head took stays in `views`."""
        with self.recorder.observing() as views:
            norms = score_batch(self.recorder, self.engine, to_device(samples))
            self.views = list(views)
        return norms, {}

    def rows_at(self, positions: Sequence[Ints]) -> list[Tensor]:
        """The head's inputs of the batch just scored, one tensor [places, D] a sample, on host."""
        found: list[Tensor] = []
        for view in self.views:
            rows = view.at_targets()[0]
            for start, _ in view.layout.split_targets():
                if len(found) < len(positions):
                    places = torch.from_numpy(positions[len(found)]).to(rows.device) + start
                    found.append(rows[places].cpu())
        return found

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[Head]:
        """The head with its parameters whole. Every rank enters it together."""
        view = self.views[-1]
        with view.whole():
            _, weight, bias, transform = view.at_targets()
            yield Head(weight, bias, transform)

    def on_host(self, head: Head) -> Head:
        """A copy of the head in host memory, made at the first call."""
        if self.host_head is None:
            weight, bias = (
                None if part is None else part.detach().to("cpu", copy=True)
                for part in (head.weight, head.bias)
            )
            self.host_head = Head(weight, bias, head.transform)
        return self.host_head


@contextlib.contextmanager
def reading(config: Config, path: str | Path) -> Iterator[TargetReader]:
    """The model at `path`, loaded once for every set and task. Every rank enters it."""
    with frozen_model(config, path) as (model, engine):
        yield TargetReader(model, engine, GradNormRecorder(model, layers=(), tokens=True))


def pass_over(
    reader: TargetReader,
    config: Config,
    measured: MeasuredSet,
    what: str,
    base: BaseStream | None = None,
) -> tuple[SetResult, BaseStream | None]:
    """The model's result on the set, and without `base` the stream that later models are compared
    with (None where no divergence is asked for).

    Args:
        reader: the loaded model.
        config: the run's.
        measured: the set; its positions say where the divergence is taken.
        what: what the log calls it.
        base: the base model's stream over the same set; None of the base model itself.
    """
    settings, lengths = config.evaluate, measured.lengths
    plan = plan_batches(lengths, ranks.world(), settings.tokens_per_microbatch, config.seed)
    losses: dict[int, tuple[float, np.ndarray]] = {}
    order: list[int] = []
    kept: list[Tensor] = []
    wanted = any(len(places) for places in measured.positions)
    for indices, norms, _ in score_batches(
        reader.model, measured.rows, plan, lengths, what, reader.score
    ):
        assert norms.tokens is not None
        for i, mean, row in zip(indices, norms.loss.tolist(), norms.tokens.loss, strict=True):
            values = row[~row.isnan()].float().cpu().numpy()
            if len(values) != measured.targets[i]:  # a loss that is no number is not left out
                values = np.full(measured.targets[i], np.nan, np.float32)
            losses[i] = mean, values
        if wanted:
            order += indices
            kept += reader.rows_at([measured.positions[i] for i in indices])
    began = time.monotonic()
    stream, kl = None, dict[int, float]()
    if wanted:
        rows = torch.cat(kept) if kept else torch.empty(0)
        # made whole once for the set, on all ranks together
        with reader.whole_head() as head:
            if base is None:
                stream = BaseStream(rows, reader.on_host(head))
            else:
                found = divergence(base, rows, head).numpy()
                counts = [len(measured.positions[i]) for i in order]
                parts = np.split(found, np.cumsum(counts)[:-1]) if counts else []
                kl = {i: float(part.sum()) for i, part in zip(order, parts, strict=True)}
    seconds = time.monotonic() - began
    return _shared(measured, losses, kl, seconds, what), stream


def divergence(base: BaseStream, rows: Tensor, head: Head, budget: int = LOGITS) -> Tensor:
    """KL(p || q) at each row, float64 [n] on host: p from the base's stream, q from `rows` [n, D]
    through `head`.
    """
    found: list[Tensor] = []
    weight = base.head.weight
    vocabulary = base.rows.shape[-1] if weight is None else len(weight)
    step = max(1, budget // max(1, vocabulary))
    for theirs, ours in zip(base.rows.split(step), rows.split(step), strict=True):
        if not len(ours):
            continue
        heartbeat.beat("divergence from the base model", len(found) * step, len(rows))
        log_p = base.head.logits(theirs.to(device())).log_softmax(-1)
        log_q = head.logits(ours.to(device())).log_softmax(-1)
        p = log_p.exp()
        # a token that the base gives no chance counts nothing, whatever the other says
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        found.append(terms.sum(-1, dtype=torch.float64).cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _shared(
    measured: MeasuredSet,
    losses: dict[int, tuple[float, np.ndarray]],
    kl: dict[int, float],
    seconds: float,
    what: str,
) -> SetResult:
    """Every rank's rows together, in the set's order."""
    parts = ranks.all_gather_object((losses, kl))
    every = {i: values for part, _ in parts for i, values in part.items()}
    sums = {i: value for _, part in parts for i, value in part.items()}
    rows = len(measured.rows)
    assert len(every) == rows, f"{what}: {len(every)} of {rows} samples were scored"
    return SetResult(
        np.array([every[i][0] for i in range(rows)], np.float64),
        measured.targets,
        np.array([sums.get(i, 0.0) for i in range(rows)]),
        np.array([len(places) if sums else 0 for places in measured.positions], np.int64),
        [every[i][1] for i in range(rows)],
        seconds,
    )
