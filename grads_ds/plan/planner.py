"""What the forecasts of one run share: the model's shape, the cluster, DeepSpeed's settings, and
every micro-batch that was played through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grads_ds.config.config import Config
from grads_ds.engine.memory_shares import USABLE
from grads_ds.plan.cluster import Cluster, Forecast
from grads_ds.plan.memory import Memory, limits_of
from grads_ds.plan.replay_deepspeed_0_19 import Replayed, replay
from grads_ds.plan.shapes import DTYPE_BYTES, Batch, shape_of, timeline_of
from grads_ds.plan.stage_time import StepTime
from grads_ds.plan.timeline import Timeline
from grads_ds.plan.traffic import Traffic
from grads_ds.plan.zero_settings import ZeroSettings

Played = tuple[Timeline, Replayed]


class Planner:
    """One run's config, a Hugging Face `model` config and a cluster."""

    def __init__(self, config: Config, model: Any, cluster: Cluster) -> None:
        self.config, self.model, self.cluster = config, model, cluster
        self.shape, self.length = shape_of(model), config.data.max_length
        self.dtype = getattr(torch, config.model.dtype)
        self.zero: dict[str, Any] = dict(config.deepspeed_json().get("zero_optimization", {}))
        self.budget = cluster.memory * USABLE
        self._played: dict[tuple[Batch, ZeroSettings], Played] = {}

    def limits(self, zero: Mapping[str, Any], ranks: int) -> ZeroSettings:
        """What governs ZeRO among `ranks` ranks under these settings."""
        size = DTYPE_BYTES[self.config.model.dtype]
        return limits_of(zero, ranks, size, self.shape.width)

    def play(self, batch: Batch, limits: ZeroSettings) -> Played:
        """The events of a micro-batch, and DeepSpeed's bookkeeping on them."""
        if (batch, limits) not in self._played:
            timeline = timeline_of(self.model, batch)
            self._played[batch, limits] = timeline, replay(timeline, limits)
        return self._played[batch, limits]

    def forecast(
        self,
        stage: str,
        micro: int,
        micro_batches: int,
        recomputed: int,
        memory: Memory,
        traffic: Traffic,
        time: StepTime,
        step_tokens: float,
        tokens: float,
        shards: int,
        advice: list[str],
    ) -> Forecast:
        """The numbers of one stage put together.

        Args:
            stage: its name.
            micro: samples of a micro-batch.
            micro_batches: of a step.
            recomputed: layers computed again.
            memory: of one rank.
            traffic: of one rank.
            time: of one step.
            step_tokens: of all ranks in one step.
            tokens: of the whole stage.
            shards: ranks that share out the parameters.
            advice: what to change.
        """
        cluster, rate = self.cluster, step_tokens / time.seconds
        reached = cluster.rate * time.arithmetic / time.seconds
        return Forecast(
            stage,
            micro,
            micro_batches,
            recomputed > 0,
            memory,
            traffic,
            time.seconds,
            rate,
            tokens / rate / 3600,
            memory.device <= self.budget,
            shards,
            recomputed,
            time.binds,
            reached / cluster.peak if cluster.peak else 0.0,
            advice,
        )
