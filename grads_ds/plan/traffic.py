"""Bytes that one rank receives for one micro-batch and one step, and how many of them cross between
hosts: pure arithmetic.

Ring collectives over N ranks move (N-1)/N of the whole through every rank, an all-reduce twice
that. Under ZeRO-3 a micro-batch gathers what the replay says
(grads_ds/plan/replay_deepspeed_0_19.py) and scatters the gradients; ZeRO-1 and 2 all-reduce them
(DeepSpeed 0.19.8 does not scatter there) and gather the updated weights once a step. A ring crosses
a host's links once, so that they carry what one rank receives. With hpZ a weight crosses between
hosts once a step, when it is first gathered: its second set of shards, whole within a host, lasts
until the optimizer's step. Recording within a host gathers from its ranks alone. Sequence
parallelism exchanges tokens for heads around every
attention, within groups of neighbouring ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from grads_ds.plan.memory import elements, persistent
from grads_ds.plan.replay_deepspeed_0_19 import Replayed
from grads_ds.plan.timeline import Timeline
from grads_ds.plan.zero_settings import ZeroSettings


@dataclass(frozen=True)
class Traffic:
    """Bytes received by one rank. first, later: weights gathered for the first micro-batch of a
    step, and for any later one; reductions: gradients of one micro-batch; once_a_step: what a step
    adds; between_hosts: of a later micro-batch, over a host's links; between_once: what a step
    sends over them beside its micro-batches; exchanged: tokens for heads and back, of one
    micro-batch.
    """

    first: float
    later: float
    reductions: float
    once_a_step: float
    between_hosts: float
    exchanged: float = 0.0
    between_once: float = 0.0

    def between_step(self, micro_batches: int) -> float:
        """Bytes of one optimizer step over a host's links."""
        return micro_batches * self.between_hosts + self.between_once

    def step(self, micro_batches: int) -> float:
        """Bytes of one optimizer step."""
        every = self.reductions + self.exchanged
        return (
            self.first + (micro_batches - 1) * self.later + micro_batches * every + self.once_a_step
        )


def training_traffic(
    timeline: Timeline,
    replayed: Replayed,
    limits: ZeroSettings,
    zero: Mapping[str, Any],
    hosts: int,
) -> Traffic:
    """Training of what is trainable in `timeline`."""
    scale = limits.dtype_bytes * (limits.ranks - 1) / limits.ranks
    _, trained = elements(timeline)
    if limits.stage < 3:
        reduced = 2 * trained * scale
        every = reduced if limits.stage == 2 else 0.0
        once = (0.0 if limits.stage == 2 else reduced) + (trained * scale if limits.stage else 0.0)
        over = hosts > 1
        return Traffic(
            0.0, 0.0, every, once, every if over else 0.0, between_once=once if over else 0.0
        )
    once = persistent(timeline, limits) * scale  # kept whole, gathered again after each step
    found = _gathered(replayed, scale, zero, hosts)
    reduced = trained * scale
    return Traffic(
        found.first,
        found.later,
        reduced,
        once,
        found.between_hosts + (reduced if hosts > 1 else 0.0),
        between_once=found.between_once + (once if hosts > 1 else 0.0),
    )


def with_exchange(
    traffic: Traffic,
    model: Any,
    tokens: int,
    size: int,
    passes: int,
    dtype_bytes: int,
    inside_a_host: bool,
) -> Traffic:
    """Ulysses' exchanges among `size` ranks beside the rest (DeepSpeed 0.19.8).

    Each layer exchanges its queries, keys, values and their outcome, for `tokens` on this rank.
    passes: 2 (forward, backward), or 3 where the forward is repeated. Key-value heads are repeated
    to one per rank.
    """
    heads = model.num_attention_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // heads
    pairs = max(getattr(model, "num_key_value_heads", None) or heads, size)
    whole = model.num_hidden_layers * tokens * 2 * (heads + pairs) * width * dtype_bytes
    exchanged = passes * whole * (size - 1) / size
    return replace(
        traffic,
        exchanged=exchanged,
        between_hosts=traffic.between_hosts + (0.0 if inside_a_host else exchanged),
    )


def scoring_traffic(
    replayed: Replayed, limits: ZeroSettings, zero: Mapping[str, Any], hosts: int
) -> Traffic:
    """Recording norms: the weights for forward and backward, nothing to reduce. `limits.ranks` is
    the number of those that share them out; hosts: 1 where these are of one host.

    There are no steps: every micro-batch is a later one.
    """
    if limits.stage < 3:
        return Traffic(0.0, 0.0, 0.0, 0.0, 0.0)
    found = _gathered(replayed, limits.dtype_bytes * (limits.ranks - 1) / limits.ranks, zero, hosts)
    return Traffic(found.later, found.later, 0.0, 0.0, found.between_hosts)


def _gathered(replayed: Replayed, scale: float, zero: Mapping[str, Any], hosts: int) -> Traffic:
    first, later = (
        (f + b) * scale for f, b in zip(replayed.forward, replayed.backward, strict=True)
    )
    if hosts == 1:
        return Traffic(first, later, 0.0, 0.0, 0.0)
    if int(zero.get("zero_hpz_partition_size", 1)) > 1:
        return Traffic(first, later, 0.0, 0.0, 0.0, between_once=replayed.forward[0] * scale)
    return Traffic(first, later, 0.0, 0.0, later, between_once=first - later)
