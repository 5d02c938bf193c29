"""What governs a simulation of ZeRO: stage, ranks and the sizes of the DeepSpeed JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ZeroSettings:
    """What governs the replay, sizes in elements: ZeRO's stage, ranks, bytes of an element, and the
    JSON's settings by their own names.
    """

    stage: int
    ranks: int
    dtype_bytes: int
    reduce_bucket_size: float
    prefetch_bucket_size: float
    persistence_threshold: float
    max_live_parameters: float
    max_reuse_distance: float
    overlap: bool
