"""What is planned for and what comes out: a cluster, one stage's forecast on it, named GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

from grads_ds.plan.memory import Memory
from grads_ds.plan.traffic import Traffic

# dense bf16 peak in FLOP/s, memory in GiB, and bytes per second that a GPU receives from the others
# of its host (NVLink, or PCIe 4.0 x16), from the vendors' data sheets
GPUS = {
    "A100-40": (312e12, 40, 300e9),
    "A100-80": (312e12, 80, 300e9),
    "H100": (989e12, 80, 450e9),
    "H200": (989e12, 141, 450e9),
    "A10": (125e12, 24, 32e9),
    "L40S": (362e12, 48, 32e9),
}


# of the peak that training of large models reaches; `--calibrate` replaces the guess
USUAL_SHARE = 0.4


# of the links inside a host that an all-gather of large tensors reaches, a guess as well
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Cluster:
    """What the job is to run on.

    `network` in bytes per second of one host's links together, `inside` of a rank's links to the
    others of its host, `rate` in FLOP/s of one rank, `peak` what its data sheet says of that (0:
    unknown).
    """

    hosts: int
    ranks_per_host: int
    memory: float
    rate: float
    network: float
    inside: float = 450e9 * LINK_SHARE
    peak: float = 0.0

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.hosts * self.ranks_per_host


@dataclass(frozen=True)
class Forecast:
    """What one stage needs. Bytes, seconds; `advice` is empty when it fits and nothing is faster.

    shards: ranks that share out the parameters. recomputed: layers computed again in the backward.
    binds: what the stage waits for: arithmetic, host link or inside link. share_of_peak: of the
    GPU's peak, that it computes at (0: unknown).
    """

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
    shards: int
    recomputed: int
    binds: str
    share_of_peak: float
    advice: list[str] = field(default_factory=list)
