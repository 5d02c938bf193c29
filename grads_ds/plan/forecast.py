"""One stage's forecast on one cluster: memory of a rank, bytes of a step, tokens a second, hours,
and what to change.

Joins the parts: shapes, memory, traffic. The time is the longer of computing and communicating a
micro-batch; the computing rate is given, a named GPU's, or measured on this host
(grads_ds/plan/calibrate.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.training import SftConfig, TrainingConfig
from grads_ds.plan.advice import make_it_fit
from grads_ds.plan.cluster import USABLE, Cluster, Forecast
from grads_ds.plan.memory import Memory, limits_of, scoring_memory, training_memory
from grads_ds.plan.replay_deepspeed_0_19 import Replayed, replay
from grads_ds.plan.shapes import DTYPE_BYTES, Batch, Shape, recorded_elements, shape_of, timeline_of
from grads_ds.plan.timeline import Timeline
from grads_ds.plan.traffic import Traffic, scoring_traffic, training_traffic, with_exchange
from grads_ds.plan.zero_settings import ZeroSettings
from grads_ds.training.division import undivided_ranks, unshared_heads


def forecasts(config: Config, model: Any, cluster: Cluster, tokens: float) -> list[Forecast]:
    """The probe's two halves and SFT. `model` is a Hugging Face config, `tokens` how many the pool
    has.

    Raises UserError where the ranks or the model's heads cannot be shared out as
    sft.sequence_parallel says.
    """
    planner = _Planner(config, model, cluster)
    chosen = (
        config.select.budget
        if isinstance(config.select.budget, float) and config.select.budget <= 1
        else 1.0
    )
    found = []
    if config.probe.epochs > 0:
        found.append(planner.training("preliminary", config.probe, tokens * config.probe.epochs))
    found.append(planner.scoring(tokens))
    found.append(planner.training("sft", config.sft, tokens * chosen * config.sft.epochs))
    return found


class _Planner:
    """What the stages of one forecast share."""

    def __init__(self, config: Config, model: Any, cluster: Cluster) -> None:
        self.config, self.model, self.cluster = config, model, cluster
        self.shape, self.length = shape_of(model), config.data.max_length
        self.dtype = getattr(torch, config.model.dtype)
        self.zero = dict(config.deepspeed_json().get("zero_optimization", {}))
        self.budget = cluster.memory * USABLE
        self.limits = limits_of(
            self.zero, cluster.ranks, DTYPE_BYTES[config.model.dtype], self.shape.width
        )
        self._played: dict[Batch, tuple[Timeline, Replayed]] = {}

    def _play(self, batch: Batch, limits: ZeroSettings) -> tuple[Timeline, Replayed]:
        if batch not in self._played:
            timeline = timeline_of(self.model, batch)
            self._played[batch] = timeline, replay(timeline, limits)
        return self._played[batch]

    def training(self, stage: str, settings: TrainingConfig, tokens: float) -> Forecast:
        """A training on `tokens`."""
        cluster, zero, limits, budget = self.cluster, self.zero, self.limits, self.budget
        section = "probe" if stage == "preliminary" else stage
        sequence = settings.sequence_parallel if isinstance(settings, SftConfig) else 1
        if problem := self._unshared(sequence):
            raise UserError(f"{section}.sequence_parallel: {problem}")

        def share(sequence: int) -> int:  # of a step's samples, for each group of ranks
            return max(1, settings.batch_size // (cluster.ranks // sequence))

        def slice_of(sequence: int) -> int:  # of a sample's tokens, for each rank
            return -(-self.length // sequence)

        micro = min(settings.micro_batch_size, share(sequence))
        count = max(1, share(sequence) // micro)

        def played(micro: int, checkpointed: bool, sequence: int) -> tuple[Timeline, Replayed]:
            mode = "checkpointed" if checkpointed else "train"
            return self._play(
                Batch(micro, slice_of(sequence), mode, self.dtype, self.config.model.lora), limits
            )

        def memory(micro: int, checkpointed: bool, sequence: int = sequence) -> Memory:
            steps = max(1, share(sequence) // micro)
            return training_memory(
                *played(micro, checkpointed, sequence), limits, zero, cluster.ranks_per_host, steps
            )

        kept = settings.gradient_checkpointing
        needed = memory(micro, kept)
        advice = []
        if needed.device > budget:
            groups = self._groups(settings) if isinstance(settings, SftConfig) else []
            advice = make_it_fit(section, micro, settings, memory, budget, zero, groups)
        elif kept and memory(micro, False).device <= budget:
            advice.append(
                f"{section}.gradient_checkpointing: false fits too and saves a quarter of the"
                " computing"
            )
        traffic = training_traffic(*played(micro, kept, sequence), limits, zero, cluster.hosts)
        each = micro * slice_of(sequence)
        if sequence > 1:
            inside = cluster.ranks_per_host % sequence == 0
            traffic = with_exchange(
                traffic, self.model, each, sequence, 3 if kept else 2, limits.dtype_bytes, inside
            )
        flop = (4 if self.config.model.lora else 6) + (2 if kept else 0)
        seconds, computing = _micro_seconds(self.shape, flop, each, self.length, cluster, traffic)
        if cluster.hosts > 1 and seconds > 1.2 * computing and limits.stage >= 3:
            advice.append(
                f"{stage} waits for the network ({seconds / computing:.1f} times the computing):"
                f" zero_hpz_partition_size: {cluster.ranks_per_host} in the DeepSpeed JSON, a"
                " larger micro-batch, or checkpointing off"
            )
        rate = each * cluster.ranks / seconds
        return Forecast(
            stage,
            micro,
            count,
            kept,
            needed,
            traffic,
            seconds * count,
            rate,
            tokens / rate / 3600,
            needed.device <= budget,
            advice,
        )

    def _unshared(self, sequence: int) -> str | None:
        """Why groups of `sequence` ranks cannot share samples, or None."""
        return undivided_ranks(self.cluster.ranks, sequence) or unshared_heads(
            self.model.to_dict(), sequence
        )

    def _groups(self, settings: SftConfig) -> list[int]:
        """Larger groups of one host's ranks that could share each sample, the smallest first; none
        where SFT would refuse them.
        """
        if self.limits.stage < 3 or settings.packing or self.config.model.attention == "eager":
            return []
        sizes = range(settings.sequence_parallel + 1, self.cluster.ranks_per_host + 1)
        return [
            size
            for size in sizes
            if self.cluster.ranks_per_host % size == 0
            and settings.batch_size % (self.cluster.ranks // size) == 0
            and not self._unshared(size)
        ]

    def scoring(self, tokens: float) -> Forecast:
        """The recording of a pool of `tokens`."""
        probe, cluster, zero = self.config.probe, self.cluster, self.zero
        # below stage 3 the frozen pass shards nothing (grads_ds/engine/model.py)
        limits = self.limits if self.limits.stage >= 3 else replace(self.limits, stage=0)
        rows = max(1, probe.tokens_per_microbatch // self.length)
        layers = (probe.layers,) if isinstance(probe.layers, str) else tuple(probe.layers)
        held = len({"anchor", "contrast"} & set(probe.extras))  # reference gradients
        anchor = held * recorded_elements(self.model, layers)

        def memory(rows: int) -> Memory:
            played = self._play(
                Batch(rows, self.length, "score", self.dtype, None, layers, limits.stage >= 3),
                limits,
            )
            return scoring_memory(*played, limits, zero, cluster.ranks_per_host, anchor)

        needed, budget, advice = memory(rows), self.budget, []
        if needed.device > budget:
            fitting = next((r for r in range(rows - 1, 0, -1) if memory(r).device <= budget), 0)
            if fitting:
                advice.append(f"probe.tokens_per_microbatch: {fitting * self.length} fits")
            elif anchor and memory(1).device - memory(1).anchor <= budget:
                advice.append(
                    "probe.extras: the anchor's gradient is whole on every GPU"
                    f" ({needed.anchor / 2**30:.1f} GiB); record fewer groups (probe.layers), or"
                    " leave anchor and contrast out"
                )
            else:
                advice.append("recording needs more GPUs: not even one sample fits")
        _, replayed = self._play(
            Batch(rows, self.length, "score", self.dtype, None, layers, limits.stage >= 3), limits
        )
        traffic = scoring_traffic(replayed, limits, zero, cluster.hosts)
        each = rows * self.length
        seconds, _ = _micro_seconds(self.shape, 4, each, self.length, cluster, traffic)
        rate = each * cluster.ranks / seconds
        return Forecast(
            "recording",
            rows,
            1,
            False,
            needed,
            traffic,
            seconds,
            rate,
            tokens / rate / 3600,
            needed.device <= budget,
            advice,
        )


def _micro_seconds(
    shape: Shape, flop: int, tokens: int, length: int, cluster: Cluster, traffic: Traffic
) -> tuple[float, float]:
    """Seconds of one micro-batch, and of its computing alone: `flop` for each parameter and token,
    and attention's own.
    """
    # half of the T x T products are masked away
    attention = 2 * shape.layers * length * shape.width
    computing = flop * tokens * (shape.parameters + attention) / cluster.rate
    return max(computing, traffic.between_hosts / cluster.network), computing
