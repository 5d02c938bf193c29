"""The forecast of a training, the preliminary one or SFT, and what would make it fit or faster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.config.training import SftConfig, TrainingConfig
from grads_ds.plan.advice import make_it_fit
from grads_ds.plan.cluster import Forecast
from grads_ds.plan.memory import Memory, training_memory
from grads_ds.plan.planner import Planner
from grads_ds.plan.quantized import quantized_elements
from grads_ds.plan.shapes import Batch
from grads_ds.plan.stage_time import StepTime, step_time, training_flop
from grads_ds.plan.traffic import Traffic, training_traffic, with_exchange
from grads_ds.training.division import undivided_ranks, unshared_heads

FASTER = 1.05  # what advice has to gain


@dataclass(frozen=True)
class _Choice:
    """How a training is done: samples of a micro-batch, activations computed again, ranks to a
    sample, hpZ within a host, and whether weights are kept from forward to backward.
    """

    micro: int
    checkpointed: bool
    sequence: int
    hpz: bool
    kept: bool = False


@dataclass(frozen=True)
class _Outcome:
    memory: Memory
    traffic: Traffic
    time: StepTime
    micro_batches: int


class _Training:
    """What the choices of one training share."""

    def __init__(self, planner: Planner, settings: TrainingConfig) -> None:
        self.planner, self.settings = planner, settings
        self.quantized = quantized_elements(planner.model, planner.config.model.lora)
        self._outcomes: dict[_Choice, _Outcome] = {}

    def share(self, sequence: int) -> int:
        """Of a step's samples, for each group of ranks that share samples."""
        return max(1, self.settings.batch_size // (self.planner.cluster.ranks // sequence))

    def slice_of(self, sequence: int) -> int:
        """Of a sample's tokens, for each rank."""
        return -(-self.planner.length // sequence)

    def of(self, choice: _Choice) -> _Outcome:
        """What a choice takes."""
        if choice not in self._outcomes:
            self._outcomes[choice] = self._outcome(choice)
        return self._outcomes[choice]

    def zero(self, choice: _Choice) -> dict[str, Any]:
        """DeepSpeed's settings under a choice."""
        zero = dict(self.planner.zero)
        if choice.hpz:
            zero.setdefault("zero_hpz_partition_size", self.planner.cluster.ranks_per_host)
        if choice.kept:
            everything = self.planner.shape.parameters
            zero |= {
                "stage3_max_live_parameters": everything,
                "stage3_max_reuse_distance": everything,
            }
        return zero

    def _outcome(self, choice: _Choice) -> _Outcome:
        planner, cluster, sequence = self.planner, self.planner.cluster, choice.sequence
        zero = self.zero(choice)
        limits = planner.limits(zero, cluster.ranks)
        lora = planner.config.model.lora
        mode = "checkpointed" if choice.checkpointed else "train"
        batch = Batch(choice.micro, self.slice_of(sequence), mode, planner.dtype, lora)
        played = planner.play(batch, limits)
        steps = max(1, self.share(sequence) // choice.micro)
        traffic = training_traffic(*played, limits, zero, cluster.hosts)
        each = choice.micro * self.slice_of(sequence)
        if sequence > 1:
            inside = cluster.ranks_per_host % sequence == 0
            passes = 3 if choice.checkpointed else 2
            traffic = with_exchange(
                traffic, planner.model, each, sequence, passes, limits.dtype_bytes, inside
            )
        again = float(choice.checkpointed)
        flop = training_flop(planner.shape, planner.length, again, lora is not None)
        return _Outcome(
            training_memory(*played, limits, zero, cluster.ranks_per_host, steps, self.quantized),
            traffic,
            step_time(flop, each, steps, cluster, traffic),
            steps,
        )

    def fits(self, choice: _Choice) -> bool:
        """Whether a GPU holds it."""
        return self.of(choice).memory.device <= self.planner.budget

    def speed(self, choice: _Choice) -> float:
        """Tokens per second and rank."""
        found = self.of(choice)
        tokens = choice.micro * self.slice_of(choice.sequence) * found.micro_batches
        return tokens / found.time.seconds


def training(planner: Planner, stage: str, settings: TrainingConfig, tokens: float) -> Forecast:
    """A training on `tokens`. Raises UserError where the ranks or the model's heads cannot be
    shared out as sft.sequence_parallel says.
    """
    section = "probe" if stage == "preliminary" else stage
    sequence = settings.sequence_parallel if isinstance(settings, SftConfig) else 1
    if problem := _unshared(planner, sequence):
        raise UserError(f"{section}.sequence_parallel: {problem}")
    task = _Training(planner, settings)
    micro = min(settings.micro_batch_size, task.share(sequence))
    hpz = int(planner.zero.get("zero_hpz_partition_size", 1)) > 1
    choice = _Choice(micro, settings.gradient_checkpointing, sequence, hpz)
    found = task.of(choice)
    if task.fits(choice):
        advice = _faster(task, choice, section)
    else:

        def memory(micro: int, checkpointed: bool, sequence: int = sequence) -> Memory:
            return task.of(_Choice(micro, checkpointed, sequence, hpz)).memory

        groups = _groups(planner, settings) if isinstance(settings, SftConfig) else []
        advice = make_it_fit(section, micro, settings, memory, planner.budget, planner.zero, groups)
    each = micro * task.slice_of(sequence) * found.micro_batches
    return planner.forecast(
        stage,
        micro,
        found.micro_batches,
        planner.shape.layers if choice.checkpointed else 0,
        found.memory,
        found.traffic,
        found.time,
        each * planner.cluster.ranks,
        tokens,
        planner.cluster.ranks if int(planner.zero.get("stage", 0)) >= 3 else 1,
        advice,
    )


def _faster(task: _Training, choice: _Choice, section: str) -> list[str]:
    """The fastest other choice, where it gains something: without computing again, larger
    micro-batches, hpZ, weights kept from forward to backward.
    """
    planner = task.planner
    sharded = int(planner.zero.get("stage", 0)) >= 3
    several = sharded and planner.cluster.hosts > 1 and planner.cluster.ranks_per_host > 1
    sizes = [choice.micro]
    while 2 * sizes[-1] <= task.share(choice.sequence):
        sizes.append(2 * sizes[-1])
    if task.of(choice).time.binds == "arithmetic":  # computing less is all that helps
        others = [replace(choice, checkpointed=False)]
    else:
        others = [
            replace(choice, micro=micro, hpz=hpz, checkpointed=checkpointed, kept=kept)
            for micro in sizes
            for kept in ((False, True) if sharded else (False,))
            for hpz in sorted({choice.hpz, several or choice.hpz})
            for checkpointed in sorted({choice.checkpointed, False}, reverse=True)
        ]
    best = choice
    for other in others:
        # the mildest change comes first; another has to be clearly faster
        if task.fits(other) and task.speed(other) > 1.02 * task.speed(best):
            best = other
    gain = task.speed(best) / task.speed(choice)
    if gain < FASTER:
        return []
    changes = []
    if best.micro != choice.micro:
        changes.append(f"{section}.micro_batch_size: {best.micro}")
    if best.checkpointed != choice.checkpointed:
        changes.append(f"{section}.gradient_checkpointing: false")
    if best.hpz != choice.hpz:
        size = planner.cluster.ranks_per_host
        changes.append(f"zero_hpz_partition_size: {size} in the DeepSpeed JSON")
    if best.kept:
        size = planner.shape.parameters
        changes.append(
            f"stage3_max_live_parameters, stage3_max_reuse_distance: {size} in the DeepSpeed JSON"
        )
    return [f"{', '.join(changes)}: {gain:.1f} times as fast"]


def _unshared(planner: Planner, sequence: int) -> str | None:
    """Why groups of `sequence` ranks cannot share samples, or None."""
    return undivided_ranks(planner.cluster.ranks, sequence) or unshared_heads(
        planner.model.to_dict(), sequence
    )


def _groups(planner: Planner, settings: SftConfig) -> list[int]:
    """Larger groups of one host's ranks that could share each sample, the smallest first; none
    where SFT would refuse them.
    """
    config, cluster = planner.config, planner.cluster
    if int(planner.zero.get("stage", 0)) < 3 or settings.packing:
        return []
    if config.model.attention == "eager":
        return []
    sizes = range(settings.sequence_parallel + 1, cluster.ranks_per_host + 1)
    return [
        size
        for size in sizes
        if cluster.ranks_per_host % size == 0
        and settings.batch_size % (cluster.ranks // size) == 0
        and not _unshared(planner, size)
    ]
