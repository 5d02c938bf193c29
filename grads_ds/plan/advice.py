"""What to change when a training does not fit: the mildest change first."""

from __future__ import annotations

from typing import Any

from grads_ds.config.training import TrainingConfig


def make_it_fit(
    section: str,
    micro: int,
    settings: TrainingConfig,
    memory: Any,
    budget: float,
    zero: dict[str, Any],
    groups: list[int],
) -> list[str]:
    """The mildest change that fits.

    Args:
        section: of the config, in which the keys stand.
        micro: samples of a micro-batch as configured.
        settings: of the training.
        memory: (samples, checkpointed, ranks to a sample) -> Memory of one rank.
        budget: bytes that a rank may take.
        zero: zero_optimization of the DeepSpeed JSON.
        groups: sizes that sequence_parallel may take, ascending.
    """
    if not settings.gradient_checkpointing and memory(micro, True).device <= budget:
        return [f"{section}.gradient_checkpointing: true fits"]
    smaller = next((m for m in range(micro - 1, 0, -1) if memory(m, True).device <= budget), 0)
    if smaller:
        return [f"{section}.micro_batch_size: {smaller} with gradient_checkpointing: true fits"]
    if group := next((n for n in groups if memory(1, True, n).device <= budget), 0):
        return [
            f"{section}.sequence_parallel: {group} fits, {group} ranks to each sample, with"
            " micro_batch_size: 1 and gradient_checkpointing: true"
        ]
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        least = memory(1, True)
        if least.device - least.optimizer - least.gradients <= budget:
            return [
                f"{section}: offload_optimizer to the CPU (`deepspeed: zero3_offload`)"
                " with micro_batch_size: 1 fits"
            ]
    if int(zero.get("stage", 0)) < 3:
        return [f"{section}: ZeRO stage 3 shards the weights too (`deepspeed: zero3`)"]
    return [f"{section} needs more GPUs, or LoRA (model.lora)"]
