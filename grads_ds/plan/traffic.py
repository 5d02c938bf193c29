"""Bytes that one rank receives for one micro-batch and one step, and how many of them cross between hosts: pure arithmetic.

Ring collectives over N ranks move (N-1)/N of the whole through every rank. Under ZeRO-3 a micro-batch gathers the weights for
the forward pass, again for the backward pass (less the last ones, which stay when they come back soon), and scatters the
gradients; ZeRO-1 and 2 reduce once and gather once a step. With hpZ the backward gathers stay inside a host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grads_ds.plan.memory import persistent, zero_setting
from grads_ds.plan.shapes import Shape


@dataclass(frozen=True)
class Traffic:
    """Bytes received by one rank: gathered weights and reduced gradients of one micro-batch, and what a step adds once."""

    gathers: float
    reductions: float
    once_a_step: float
    between_hosts: float

    def step(self, micro_batches: int) -> float:
        """Bytes of one optimizer step."""
        return micro_batches * (self.gathers + self.reductions) + self.once_a_step


def _part(ranks: int) -> float:
    return (ranks - 1) / ranks


def training_traffic(
    shape: Shape, dtype_bytes: int, ranks: int, hosts: int, zero: Mapping[str, Any], trained: int | None = None
) -> Traffic:
    """Training of `trained` (all, without adapters) parameters; `between_hosts` is of one micro-batch."""
    stage = int(zero.get("stage", 0))
    trained = shape.parameters if trained is None else trained
    part = _part(ranks)
    gradients = trained * dtype_bytes * part
    if stage < 3:
        once = gradients * (1 if stage == 2 else 2)
        every = gradients if stage == 2 else 0.0
        return Traffic(0.0, every, once, every if hosts > 1 else 0.0)
    sharded = shape.parameters - persistent(shape, zero)
    reuse = zero_setting(zero, "stage3_max_reuse_distance", shape.width)
    live = zero_setting(zero, "stage3_max_live_parameters", shape.width)
    # a weight with x parameters after it comes back 2x later, the head at once. Measured within 8 % while the two limits are
    # of one size, as DeepSpeed sets them; where far more may live than the reuse distance says, up to a quarter less moves
    stays = shape.parameters if reuse >= 2 * shape.parameters else min(reuse, live) / 2 + shape.embedding
    again = max(0.0, sharded - stays)
    scale = dtype_bytes * part
    inside = again if int(zero.get("zero_hpz_partition_size", 1)) > 1 else 0.0
    once = persistent(shape, zero) * scale  # kept whole, gathered again after each step
    return Traffic(
        (sharded + again) * scale, gradients, once, (sharded + again - inside) * scale + gradients if hosts > 1 else 0.0
    )


def scoring_traffic(shape: Shape, dtype_bytes: int, ranks: int, hosts: int, zero: Mapping[str, Any]) -> Traffic:
    """Recording norms: the weights for forward and backward, nothing to reduce."""
    if int(zero.get("stage", 0)) < 3:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    whole = training_traffic(shape, dtype_bytes, ranks, hosts, zero)
    return Traffic(whole.gathers, 0.0, 0.0, whole.gathers if hosts > 1 else 0.0)
