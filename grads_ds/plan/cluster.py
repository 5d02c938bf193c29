"""What is planned for and what comes out: a cluster, one stage's forecast on it, named GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

from grads_ds.plan.memory import Memory
from grads_ds.plan.traffic import Traffic

# dense bf16 peak in FLOP/s and memory in GiB, from the vendors' data sheets
GPUS = {
    "A100-40": (312e12, 40),
    "A100-80": (312e12, 80),
    "H100": (989e12, 80),
    "H200": (989e12, 141),
    "A10": (125e12, 24),
    "L40S": (362e12, 48),
}


# of the peak that training of large models reaches; `--calibrate` replaces the guess
USUAL_SHARE = 0.4


USABLE = 0.92  # of a GPU's memory: the rest is CUDA's context, NCCL and fragmentation


@dataclass(frozen=True)
class Cluster:
    """What the job is to run on.

    `network` in bytes per second of one host's links together, `rate` in FLOP/s of one rank.
    """

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
