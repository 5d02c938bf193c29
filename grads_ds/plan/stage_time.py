"""How long a step takes and what it waits for: arithmetic, the links inside a host, the
host's link to the others. Pure arithmetic.

The three overlap: the longest counts. FLOP of a token, with P the parameters of the repeated
layers, H = V d those of the head, T the sample's length:

    forward 2 P + 2 L T d (attention; its masked half left out), 2 H
    backward of activations the same again, of weights as much as the matrices' forward
    layers computed again: their forward once more
    the recorder's head pass: logits, dL/dh, the norm's products 2 min(T, d) V, and the logits once
    more where a sample's do not fit into the head's budget
"""

from __future__ import annotations

from dataclasses import dataclass

from grads_ds.gradnorm.formulas.head import DEFAULT_BUDGET
from grads_ds.plan.cluster import Cluster
from grads_ds.plan.shapes import Shape
from grads_ds.plan.traffic import Traffic


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on; `seconds` is the longest."""

    arithmetic: float
    host_link: float
    inside_link: float

    @property
    def seconds(self) -> float:
        """With all of them at the same time."""
        return max(self.arithmetic, self.host_link, self.inside_link)

    @property
    def binds(self) -> str:
        """What the others wait for."""
        named = {
            "arithmetic": self.arithmetic,
            "host link": self.host_link,
            "inside link": self.inside_link,
        }
        return max(named, key=lambda name: named[name])


def training_flop(shape: Shape, length: int, recomputed: float, lora: bool) -> float:
    """FLOP of one token of a training; `recomputed`: share of the layers computed again."""
    layers = shape.body + shape.layers * length * shape.width
    # frozen weights have no gradients of their own; the adapters' are small
    passes = 2 if lora else 3
    return 2.0 * (passes * (layers + shape.head) + recomputed * layers)


def scoring_flop(shape: Shape, length: int, recomputed: float) -> float:
    """FLOP of one token of the recording, every position a target."""
    layers = shape.body + shape.layers * length * shape.width
    looks = 2 if length * shape.vocabulary <= DEFAULT_BUDGET else 3
    norm = min(length, shape.width) * shape.vocabulary
    return 2.0 * ((2 + recomputed) * layers + looks * shape.head + norm)


def step_time(
    flop: float, tokens: float, micro_batches: int, cluster: Cluster, traffic: Traffic
) -> StepTime:
    """Seconds of one step of a rank.

    Args:
        flop: of a token.
        tokens: of a micro-batch.
        micro_batches: of a step.
        cluster: what it runs on.
        traffic: of one rank.
    """
    return StepTime(
        flop * tokens * micro_batches / cluster.rate,
        traffic.between_step(micro_batches) / cluster.network,
        traffic.step(micro_batches) / cluster.inside if cluster.ranks_per_host > 1 else 0.0,
    )


def duration(seconds: float) -> str:
    """In seconds, minutes, hours or days, whichever reads best."""
    if seconds < 90:
        return "under 1 s" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
