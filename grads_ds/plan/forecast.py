"""One stage's forecast on one cluster: memory of a rank, bytes of a step, tokens a second, hours, and what to change.

Joins the parts: shapes, memory, traffic. The time is the longer of computing and communicating a micro-batch; the computing
rate is given, a named GPU's, or measured on this host (`calibrate`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from grads_ds.config import Config, TrainingConfig
from grads_ds.gradnorm.head import DEFAULT_BUDGET
from grads_ds.plan.memory import Memory, scoring_memory, training_memory
from grads_ds.plan.shapes import DTYPE_BYTES, Shape, activation_bytes, shape_of
from grads_ds.plan.traffic import Traffic, scoring_traffic, training_traffic

# dense bf16 peak in FLOP/s and memory in GiB, from the vendors' data sheets
GPUS = {
    "A100-40": (312e12, 40), "A100-80": (312e12, 80), "H100": (989e12, 80), "H200": (989e12, 141), "A10": (125e12, 24),
    "L40S": (362e12, 48),
}  # fmt: skip
USUAL_SHARE = 0.4  # of the peak that training of large models reaches; `--calibrate` replaces the guess
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL and fragmentation


@dataclass(frozen=True)
class Cluster:
    """What the job is to run on. `network` in bytes per second of one host's links together, `rate` in FLOP/s of one rank."""

    hosts: int
    ranks_per_host: int
    memory: float
    rate: float
    network: float

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.hosts * self.ranks_per_host


@dataclass(frozen=True)
class Forecast:
    """What one stage needs. Bytes, seconds; `advice` is empty when it fits."""

    stage: str
    micro_batch: int
    micro_batches: int
    checkpointed: bool
    memory: Memory
    traffic: Traffic
    seconds_per_step: float
    tokens_per_second: float
    hours: float
    fits: bool
    advice: list[str] = field(default_factory=list)


def forecasts(config: Config, model: Any, cluster: Cluster, tokens: float) -> list[Forecast]:
    """The probe's two halves and SFT. `model` is a Hugging Face config, `tokens` how many the pool has."""
    shape = shape_of(model)
    length = config.data.max_length
    chosen = config.select.budget if isinstance(config.select.budget, float) and config.select.budget <= 1 else 1.0
    found = []
    if config.probe.epochs > 0:
        found.append(
            _training("preliminary", config, config.probe, model, shape, cluster, length, tokens * config.probe.epochs)
        )
    found.append(_scoring(config, model, shape, cluster, length, tokens))
    found.append(
        _training("sft", config, config.sft, model, shape, cluster, length, tokens * chosen * config.sft.epochs)
    )
    return found


def _training(
    stage: str,
    config: Config,
    settings: TrainingConfig,
    model: Any,
    shape: Shape,
    cluster: Cluster,
    length: int,
    tokens: float,
) -> Forecast:
    zero, size, dtype = _zero(config), DTYPE_BYTES[config.model.dtype], getattr(torch, config.model.dtype)
    trained = _adapter_parameters(config, shape) if config.model.lora else None
    share = max(1, settings.batch_size // cluster.ranks)

    def memory(micro: int, checkpointed: bool) -> Memory:
        activations = activation_bytes(model, dtype, micro, length, "checkpointed" if checkpointed else "train")
        return training_memory(shape, size, cluster.ranks, cluster.ranks_per_host, zero, activations, trained)

    micro = min(settings.micro_batch_size, share)
    needed = memory(micro, settings.gradient_checkpointing)
    room = cluster.memory * USABLE
    advice = []
    section = "probe" if stage == "preliminary" else stage
    if needed.device > room:
        advice = _make_it_fit(section, micro, settings, memory, room, zero)
    elif settings.gradient_checkpointing and memory(micro, False).device <= room:
        advice.append(f"{section}.gradient_checkpointing: false fits too and saves a quarter of the computing")
    traffic = training_traffic(shape, size, cluster.ranks, cluster.hosts, zero, trained)
    flop = (4 if trained is not None else 6) + (2 if settings.gradient_checkpointing else 0)
    seconds, computing = _micro_seconds(shape, flop, micro * length, length, cluster, traffic)
    if cluster.hosts > 1 and seconds > 1.2 * computing and int(zero.get("stage", 0)) >= 3:
        advice.append(
            f"{stage} waits for the network ({seconds / computing:.1f} times the computing): zero_hpz_partition_size: "
            f"{cluster.ranks_per_host} in the DeepSpeed JSON, a larger micro-batch, or checkpointing off"
        )
    count = max(1, share // micro)
    return _told(
        stage,
        micro,
        count,
        settings.gradient_checkpointing,
        needed,
        traffic,
        seconds,
        micro * length,
        cluster,
        tokens,
        room,
        advice,
    )


def _scoring(config: Config, model: Any, shape: Shape, cluster: Cluster, length: int, tokens: float) -> Forecast:
    zero, size, dtype = _zero(config), DTYPE_BYTES[config.model.dtype], getattr(torch, config.model.dtype)
    rows = max(1, config.probe.tokens_per_microbatch // length)

    def memory(rows: int) -> Memory:
        activations = activation_bytes(model, dtype, rows, length, "score")
        return scoring_memory(shape, size, cluster.ranks, zero, activations, DEFAULT_BUDGET)

    needed, room, advice = memory(rows), cluster.memory * USABLE, []
    if needed.device > room:
        fitting = next((r for r in range(rows - 1, 0, -1) if memory(r).device <= room), 0)
        advice.append(
            f"probe.tokens_per_microbatch: {fitting * length} fits"
            if fitting
            else "recording needs more GPUs: not even one sample fits"
        )
    traffic = scoring_traffic(shape, size, cluster.ranks, cluster.hosts, zero)
    seconds, _ = _micro_seconds(shape, 4, rows * length, length, cluster, traffic)
    return _told("recording", rows, 1, False, needed, traffic, seconds, rows * length, cluster, tokens, room, advice)


def _told(
    stage: str, micro: int, count: int, checkpointed: bool, needed: Memory, traffic: Traffic, seconds: float, tokens_each: int,
    cluster: Cluster, tokens: float, room: float, advice: list[str],
) -> Forecast:  # fmt: skip
    rate = tokens_each * cluster.ranks / seconds
    return Forecast(
        stage,
        micro,
        count,
        checkpointed,
        needed,
        traffic,
        seconds * count,
        rate,
        tokens / rate / 3600,
        needed.device <= room,
        advice,
    )


def _make_it_fit(
    section: str, micro: int, settings: TrainingConfig, memory: Any, room: float, zero: dict[str, Any]
) -> list[str]:
    """The mildest change that fits."""
    if not settings.gradient_checkpointing and memory(micro, True).device <= room:
        return [f"{section}.gradient_checkpointing: true fits"]
    smaller = next((m for m in range(micro - 1, 0, -1) if memory(m, True).device <= room), 0)
    if smaller:
        return [f"{section}.micro_batch_size: {smaller} with gradient_checkpointing: true fits"]
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        least = memory(1, True)
        if least.device - least.optimizer - least.gradients <= room:
            return [
                f"{section}: offload_optimizer to the CPU (configs/deepspeed/zero3_offload.json) with micro_batch_size: 1 fits"
            ]
    if int(zero.get("stage", 0)) < 3:
        return [f"{section}: ZeRO stage 3 shards the weights too (configs/deepspeed/zero3.json)"]
    return [f"{section} needs more GPUs, or LoRA (model.lora)"]


def _micro_seconds(
    shape: Shape, flop: int, tokens: int, length: int, cluster: Cluster, traffic: Traffic
) -> tuple[float, float]:
    """Seconds of one micro-batch, and of its computing alone: `flop` for each parameter and token, and attention's own."""
    attention = 2 * shape.layers * length * shape.width  # half of the T x T products are masked away
    computing = flop * tokens * (shape.parameters + attention) / cluster.rate
    return max(computing, traffic.between_hosts / cluster.network), computing


def _adapter_parameters(config: Config, shape: Shape) -> int:
    """Parameters of adapters on all linear layers: r (in + out) each, from matrices of the repeated blocks' sizes."""
    rank = config.model.lora.r if config.model.lora else 0
    matrices = [size for size in shape.tensors if size > 64 * shape.width and size != shape.embedding]
    return int(sum(rank * (size / shape.width + shape.width) for size in matrices))


def _zero(config: Config) -> dict[str, Any]:
    return dict(config.deepspeed_json().get("zero_optimization", {}))


def calibrate(dtype: torch.dtype) -> float:
    """FLOP/s that matrix products of a training's size reach on this host's device, in about a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(2):
        left @ right
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
