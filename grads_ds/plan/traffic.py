"""Bytes that one rank receives for one micro-batch and one step, and how many of them cross between hosts: pure arithmetic.

Ring collectives over N ranks move (N-1)/N of the whole through every rank, an all-reduce twice that. Under ZeRO-3 a micro-batch gathers
what the replay says (grads_ds/plan/replay.py) and scatters the gradients; ZeRO-1 and 2 all-reduce them (DeepSpeed 0.19.8 does
not scatter there) and gather the updated weights once a step. With hpZ the backward gathers stay inside a host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grads_ds.plan.memory import elements, persistent
from grads_ds.plan.replay import Limits, Replayed
from grads_ds.plan.timeline import Timeline


@dataclass(frozen=True)
class Traffic:
    """Bytes received by one rank. first, later: weights gathered for the first micro-batch of a step, and for any later one; reductions:
    gradients of one micro-batch; once_a_step: what a step adds; between_hosts: of a later micro-batch, over a rank's links."""

    first: float
    later: float
    reductions: float
    once_a_step: float
    between_hosts: float

    def step(self, micro_batches: int) -> float:
        """Bytes of one optimizer step."""
        return self.first + (micro_batches - 1) * self.later + micro_batches * self.reductions + self.once_a_step


def training_traffic(
    timeline: Timeline, replayed: Replayed, limits: Limits, zero: Mapping[str, Any], hosts: int
) -> Traffic:
    """Training of what is trainable in `timeline`."""
    scale = limits.dtype_bytes * (limits.ranks - 1) / limits.ranks
    _, trained = elements(timeline)
    if limits.stage < 3:
        reduced = 2 * trained * scale
        every = reduced if limits.stage == 2 else 0.0
        once = (0.0 if limits.stage == 2 else reduced) + (trained * scale if limits.stage else 0.0)
        return Traffic(0.0, 0.0, every, once, every if hosts > 1 else 0.0)
    once = persistent(timeline, limits) * scale  # kept whole, gathered again after each step
    found = _gathered(replayed, scale, zero, hosts)
    reduced = trained * scale
    return Traffic(found.first, found.later, reduced, once, found.between_hosts + (reduced if hosts > 1 else 0.0))


def scoring_traffic(replayed: Replayed, limits: Limits, zero: Mapping[str, Any], hosts: int) -> Traffic:
    """Recording norms: the weights for forward and backward, nothing to reduce. There are no steps: every micro-batch is a later one."""
    if limits.stage < 3:
        return Traffic(0.0, 0.0, 0.0, 0.0, 0.0)
    found = _gathered(replayed, limits.dtype_bytes * (limits.ranks - 1) / limits.ranks, zero, hosts)
    return Traffic(found.later, found.later, 0.0, 0.0, found.between_hosts)


def _gathered(replayed: Replayed, scale: float, zero: Mapping[str, Any], hosts: int) -> Traffic:
    first, later = ((f + b) * scale for f, b in zip(replayed.forward, replayed.backward, strict=True))
    inside = replayed.backward[1] * scale if int(zero.get("zero_hpz_partition_size", 1)) > 1 else 0.0
    return Traffic(first, later, 0.0, 0.0, later - inside if hosts > 1 else 0.0)
