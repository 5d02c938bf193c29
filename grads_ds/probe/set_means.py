"""Means over all rows of a prepared set, on every rank: gradient, hidden state, head rows.

Runs one frozen pass over the set, on all ranks; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data.batches import plan_batches
from grads_ds.distributed import ranks
from grads_ds.distributed.progress import with_progress
from grads_ds.engine.frozen_pass import lengths_of, score_batch, to_device
from grads_ds.engine.module_order import release_leftovers
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.probe.observed import observing
from grads_ds.probe.target_statistics import Asked


@dataclass(frozen=True)
class Means:
    """Means over all rows of a set, on every rank; None what was not asked for."""

    gradient: dict[str, Tensor] | None
    hidden_D: Tensor
    row_squares_V: Tensor | None


def planned_batches(
    config: Config, rows: Any, what: str, engine: Any
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """This rank's planned micro-batches of `rows`: indices and tensors. Every rank exhausts it."""
    lengths = lengths_of(rows)
    budget = config.probe.tokens_per_microbatch
    assert budget != "auto"  # measured before the pass began
    plan = plan_batches(lengths, ranks.world(), budget, config.seed)
    if ranks.is_main():
        print(f"{what}: {plan.summary()}", flush=True)
    for local in with_progress(plan, lengths, what):
        yield list(local), to_device([rows[i] for i in local])
        release_leftovers(engine)


def means_of(
    config: Config,
    rows: Any,
    what: str,
    recorder: GradNormRecorder,
    engine: Any,
    gradient: bool,
    row_squares: bool = False,
) -> Means:
    """The mean gradient (fp32, by parameter name), pooled hidden state and squared head rows.

    Args:
        config, engine: of this probe.
        rows: a prepared data set.
        what: how the rows are called while the pass runs.
        recorder: measures the gradients; a recorder of losses alone does without.
        gradient, row_squares: whether these are wanted.
    """
    counted = 0
    hidden_D: Tensor | None = None
    squares_V: Tensor | None = None

    def batches() -> Iterator[dict[str, Tensor]]:
        nonlocal counted, hidden_D, squares_V
        for local, batch in planned_batches(config, rows, what, engine):
            # the dummy row of a rank without work counts, with a gradient of zero
            counted += max(1, len(local))
            yield batch
            # here the batch is scored; the dummy row adds nothing
            share = observed.pooled().double().sum(0) * bool(local)
            hidden_D = share if hidden_D is None else hidden_D + share
            if row_squares:
                found = observed.statistics().row_squares
                assert found is not None
                squares_V = found if squares_V is None else squares_V + found

    alone = losses_alone(recorder)
    asked = Asked(row_squares=True) if row_squares else None
    with observing(recorder if gradient else alone, asked) as observed:
        if gradient:
            try:
                mean = recorder.mean_gradient(batches())
            except ValueError as error:  # some have to be measured one sample at a time
                raise UserError(
                    f"probe.anchor: {error}; leave their groups out of probe.layers"
                ) from error
        else:
            mean = {}
            for batch in batches():
                score_batch(alone, engine, batch)
    sums = [*mean.values()]
    for value in sums:
        value *= counted / len(rows)
    assert hidden_D is not None
    for value in (hidden_D, squares_V):
        if value is not None:
            value /= len(rows)
            sums.append(value)
    with ranks.everyone():
        for value in sums if ranks.world() > 1 else ():
            torch.distributed.all_reduce(value)
    if not all(bool(torch.isfinite(value).all()) for value in sums):
        raise UserError(
            f"probe.anchor: wanted samples with finite gradients; found one without in {what}; look"
            " for broken rows"
        )
    return Means(mean if gradient else None, hidden_D, squares_V)


def losses_alone(recorder: GradNormRecorder) -> GradNormRecorder:
    """A recorder of the same model for no layers: the losses, without a backward."""
    return GradNormRecorder(
        recorder.model,
        (),
        loss_reduction=recorder.loss_reduction,
        gather=recorder.gather,
        check=recorder.scorer.check,
    )
