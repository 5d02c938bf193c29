"""Bytes of one rank, by what they are for, under DeepSpeed's ZeRO with Adam: pure arithmetic.

Seen in DeepSpeed 0.19.8. Per parameter and rank, with b the bytes of the model's dtype, N ranks:

    stage 3   weights b/N, gradients b/N, float32 copy 4/N, Adam's two moments 8/N; gathered layers and buckets beside them
    stage 2   weights b, gradients b/N, float32 copy and moments 12/N
    stage 1   weights b, gradients b, float32 copy and moments 12/N
    stage 0   weights b, gradients b, float32 copy and moments 12

Offloaded parts go to the host's memory, once for each of its ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grads_ds.plan.shapes import Shape

# what DeepSpeed takes where the JSON says nothing (zero/config.py)
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device by use, and in host memory."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    buckets: float
    activations: float
    head: float
    host: float

    @property
    def device(self) -> float:
        """All of the device's."""
        return (
            self.weights + self.gradients + self.optimizer + self.gathered + self.buckets + self.activations + self.head
        )


def zero_setting(zero: Mapping[str, Any], key: str, width: int) -> float:
    """A setting of the JSON's zero_optimization, "auto" resolved as transformers does, absent ones as DeepSpeed does."""
    value = zero.get(key, DEFAULTS[key])
    if value != "auto":
        return float(value)
    auto = {"reduce_bucket_size": width**2, "stage3_prefetch_bucket_size": 0.9 * width**2}
    return auto.get(key, 10.0 * width if key == "stage3_param_persistence_threshold" else DEFAULTS[key])


def persistent(shape: Shape, zero: Mapping[str, Any]) -> int:
    """Parameters in tensors so small that ZeRO-3 keeps them whole on every rank (norms, biases)."""
    threshold = zero_setting(zero, "stage3_param_persistence_threshold", shape.width)
    return sum(size for size in shape.tensors if size <= threshold)


def gathered_parameters(shape: Shape, zero: Mapping[str, Any]) -> float:
    """Parameters whole at once under ZeRO-3, beyond their shards: at least the largest that is used as one, at most what fits the limits.

    What lies within the reuse distance stays from the forward to the backward pass; more comes with the prefetch bucket.
    """
    live = zero_setting(zero, "stage3_max_live_parameters", shape.width)
    prefetch = zero_setting(zero, "stage3_prefetch_bucket_size", shape.width)
    least = max(shape.embedding, shape.block) + prefetch
    return min(shape.parameters, max(least, live))


def training_memory(
    shape: Shape,
    dtype_bytes: int,
    ranks: int,
    ranks_per_host: int,
    zero: Mapping[str, Any],
    activations: float,
    trained: int | None = None,
) -> Memory:
    """A rank that trains `trained` (all, without adapters) of the parameters."""
    stage = int(zero.get("stage", 0))
    trained = shape.parameters if trained is None else trained
    share = [1, ranks][stage >= 3]
    weights = shape.parameters * dtype_bytes / share + (
        persistent(shape, zero) * dtype_bytes if stage >= 3 and ranks > 1 else 0
    )
    gradients = trained * dtype_bytes / (ranks if stage >= 2 else 1)
    optimizer = trained * 12 / (ranks if stage >= 1 else 1)
    gathered = gathered_parameters(shape, zero) * dtype_bytes if stage >= 3 else 0.0
    buckets = (
        zero_setting(zero, "reduce_bucket_size", shape.width)
        * dtype_bytes
        * (2 if zero.get("overlap_comm", stage >= 3) else 1)
    )
    buckets = min(buckets, 2 * trained * dtype_bytes) if stage >= 1 else 0.0
    host = 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") == "cpu":
        host += (optimizer + gradients) * ranks_per_host
        optimizer = gradients = 0.0
    if stage >= 3 and zero.get("offload_param", {}).get("device", "none") == "cpu":
        host += weights * ranks_per_host
        weights = 0.0
    return Memory(weights, gradients, optimizer, gathered, buckets, activations, 0.0, host)


def scoring_memory(
    shape: Shape, dtype_bytes: int, ranks: int, zero: Mapping[str, Any], activations: float, head_elements: int
) -> Memory:
    """A rank that records norms on frozen weights: no gradients, no optimizer; the head in chunks of `head_elements` logits."""
    stage3 = int(zero.get("stage", 0)) >= 3
    weights = shape.parameters * dtype_bytes / (ranks if stage3 else 1)
    weights += persistent(shape, zero) * dtype_bytes if stage3 and ranks > 1 else 0
    gathered = gathered_parameters(shape, zero) * dtype_bytes if stage3 else 0.0
    return Memory(weights, 0.0, 0.0, gathered, 0.0, activations, 3 * 4.0 * head_elements, 0.0)
