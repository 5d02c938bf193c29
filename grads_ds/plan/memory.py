"""Bytes of one rank, by what they are for, under DeepSpeed's ZeRO with Adam: arithmetic on a
replayed timeline.

Seen in DeepSpeed 0.19.8. Per trained parameter and rank, with b the bytes of the model's dtype, N
ranks:

    stage 3   weights b/N, gradients b/N, float32 copy 4/N, Adam's two moments 8/N
    stage 2   weights b, gradients b/N (and the sum so far, b/N, where micro-batches accumulate),
              float32 copy and moments 12/N
    stage 1   weights b, gradients b, float32 copy and moments 12/N
    stage 0   weights b, gradients b, moments 8 (and a float32 copy of 4 where b is 2)

Frozen weights take b, or b/N under stage 3; those in 4 bits (NF4, its scales in 8) take 0.52 on
every rank, which loads them whole and keeps them whole from forward to backward. Beside these stand
what is gathered whole, activations and gradients on their way during a micro-batch, or else what
the update needs: its gradients once more, in one piece and in float32. Offloaded parts go to the
host's memory, once for each of its ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grads_ds.plan.quantized import FOUR_BIT
from grads_ds.plan.replay_deepspeed_0_19 import Replayed
from grads_ds.plan.timeline import Timeline
from grads_ds.plan.zero_settings import ZeroSettings

# what DeepSpeed takes where the JSON says nothing (zero/config.py)
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device by use, and in host memory. gathered, buckets, activations
    and head are those of a micro-batch's worst moment, update is the optimizer's: the larger of the
    two counts.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    buckets: float
    activations: float
    head: float
    update: float
    anchor: float
    host: float

    @property
    def device(self) -> float:
        """The most of the device's at once."""
        moment = self.gathered + self.buckets + self.activations + self.head
        return (
            self.weights + self.gradients + self.optimizer + self.anchor + max(moment, self.update)
        )


def limits_of(zero: Mapping[str, Any], ranks: int, dtype_bytes: int, width: int) -> ZeroSettings:
    """The JSON's zero_optimization, "auto" resolved as transformers does, what is absent as
    DeepSpeed does.
    """
    auto = {
        "reduce_bucket_size": width**2,
        "stage3_prefetch_bucket_size": int(0.9 * width**2),
        "stage3_param_persistence_threshold": 10 * width,
    }

    def setting(key: str) -> float:
        value = zero.get(key, DEFAULTS[key])
        return float(auto.get(key, DEFAULTS[key]) if value == "auto" else value)

    stage = int(zero.get("stage", 0))
    return ZeroSettings(
        stage,
        ranks,
        dtype_bytes,
        setting("reduce_bucket_size"),
        setting("stage3_prefetch_bucket_size"),
        setting("stage3_param_persistence_threshold"),
        setting("stage3_max_live_parameters"),
        setting("stage3_max_reuse_distance"),
        bool(zero.get("overlap_comm", stage >= 3)),
    )


def elements(timeline: Timeline) -> tuple[int, int]:
    """(all parameters, trained ones)."""
    weights = timeline.weights.values()
    return sum(w.numel for w in weights), sum(w.numel for w in weights if w.trained)


def persistent(timeline: Timeline, limits: ZeroSettings) -> int:
    """Parameters in tensors so small that ZeRO-3 keeps them whole on every rank (norms, biases)."""
    return sum(
        w.numel for w in timeline.weights.values() if w.numel <= limits.persistence_threshold
    )


def _weights(timeline: Timeline, limits: ZeroSettings, zero: Mapping[str, Any]) -> float:
    count, _ = elements(timeline)
    if limits.stage < 3:
        return count * limits.dtype_bytes
    shards = count / limits.ranks
    if limits.ranks > 1:
        shards += persistent(timeline, limits)
    group = int(zero.get("zero_hpz_partition_size", 1))
    if group > 1:  # a second set of shards, complete within each group of ranks
        shards += count / group
    return shards * limits.dtype_bytes


def training_memory(
    timeline: Timeline,
    replayed: Replayed,
    limits: ZeroSettings,
    zero: Mapping[str, Any],
    ranks_per_host: int,
    micro_batches: int,
    quantized: int = 0,
) -> Memory:
    """A rank that trains what is trainable in `timeline`.

    Args:
        timeline, replayed: of a micro-batch.
        limits: what governs ZeRO.
        zero: the JSON's zero_optimization.
        ranks_per_host: which share the host's memory.
        micro_batches: of a step.
        quantized: frozen elements that are held in 4 bits.
    """
    size, stage, ranks = limits.dtype_bytes, limits.stage, limits.ranks
    _, trained = elements(timeline)
    weights = _weights(timeline, limits, zero)
    weights -= quantized * size / (ranks if stage >= 3 else 1)
    weights += quantized * FOUR_BIT
    gradients = trained * size / (ranks if stage >= 2 else 1)
    # stage 2 makes a micro-batch's own when it comes to them (counted with the buckets), and keeps
    # the sum of earlier ones
    kept = gradients if stage != 2 or micro_batches > 1 else 0.0
    # stage 3 means to do without where b is 4, and does not (0.19.8)
    copy = 0 if size == 4 and stage == 0 else 4
    optimizer = trained * (8 + copy) / (ranks if stage >= 1 else 1)
    share = trained / (ranks if stage >= 1 else 1)
    if stage >= 3:
        setting = zero.get("sub_group_size", "auto")
        share = min(share, float(DEFAULTS["sub_group_size"] if setting == "auto" else setting))
    # stage 3 never lets go of its bucket
    bucket = (
        limits.reduce_bucket_size * size
        if stage >= 3 and zero.get("contiguous_gradients", True)
        else 0.0
    )
    # the gradients, still there, flattened and then in float32
    update = (
        share * (size + (4 if size < 4 else 0)) + bucket + (gradients - kept) if stage >= 1 else 0.0
    )
    host = 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") == "cpu":
        host += (optimizer + gradients) * ranks_per_host
        optimizer = kept = update = 0.0
    if stage >= 3 and zero.get("offload_param", {}).get("device", "none") == "cpu":
        host += weights * ranks_per_host
        weights = 0.0
    buckets = bucket + replayed.buckets
    return Memory(
        weights,
        kept,
        optimizer,
        replayed.gathered,
        buckets,
        replayed.activations,
        0.0,
        update,
        0.0,
        host,
    )


def scoring_memory(
    timeline: Timeline,
    replayed: Replayed,
    limits: ZeroSettings,
    zero: Mapping[str, Any],
    ranks_per_host: int,
    anchor: float,
    rows: int,
    layers: int,
    check: tuple[float, float],
) -> Memory:
    """A rank that records norms on frozen weights: no gradients, no optimizer.

    Args:
        timeline, replayed: of a micro-batch.
        limits: what governs ZeRO.
        zero: the JSON's zero_optimization.
        ranks_per_host: which share the host's memory.
        anchor: elements of a reference gradient, whole on every rank in float32.
        rows: samples of the micro-batch.
        layers: of the model.
        check: bytes that the first micro-batch's check of one sample takes, beside that sample's
            activations: at its head, and of gradients at its end.
    """
    weights, host = _weights(timeline, limits, zero), 0.0
    if limits.stage >= 3 and zero.get("offload_param", {}).get("device", "none") == "cpu":
        weights, host = 0.0, weights * ranks_per_host
    # the check's backward ends with all gradients and one layer's activations
    checked, gathered = replayed.at_head
    last_layer = max(replayed.activations - checked, checked / layers)
    activations, gathered, head = max(
        (replayed.activations, replayed.gathered, replayed.head),
        (checked / rows, gathered, check[0]),
        (last_layer / rows, replayed.gathered, check[1]),
        key=sum,
    )
    return Memory(weights, 0.0, 0.0, gathered, 0.0, activations, head, 0.0, 4 * anchor, host)
