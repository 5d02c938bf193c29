"""Step `kernels`: where the device's time goes while one micro-batch is scored.

A Llama of 1B in bfloat16: plain forward and backward, scoring of all layers, of the embedding and
head. For each the kernels that take longest, how many there are, and what the device was busy of
the wall's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from step import Step, random_batch, random_llama, start, synchronised_clock
from torch.profiler import ProfilerActivity, profile

from grads_ds import GradNormRecorder

LISTED = 12


def profiled(step: Step, run: Callable[[], Any]) -> dict[str, Any]:
    """One warmed-up call: seconds, seconds of kernels, and the kernels that take longest."""
    for _ in range(2):
        run()
    began = synchronised_clock(step.device)
    run()
    seconds = synchronised_clock(step.device) - began
    activities = [ProfilerActivity.CPU] if step.cpu else [ProfilerActivity.CUDA]
    with profile(activities=activities) as records:
        run()
        synchronised_clock(step.device)
    name = "self_cpu_time_total" if step.cpu else "self_device_time_total"
    events = sorted(records.key_averages(), key=lambda event: -getattr(event, name))
    return {
        "seconds": seconds,
        "seconds_of_kernels": sum(getattr(event, name) for event in events) / 1e6,
        "kernels": sum(event.count for event in events),
        "longest": {
            event.key[:110]: [round(getattr(event, name) / 1e3, 3), event.count]
            for event in events[:LISTED]
        },
    }


def run(step: Step) -> bool:
    """Milliseconds and calls of each kernel."""
    width, layers, lengths = (64, 2, [32] * 2) if step.cpu else (2048, 22, [2048] * 4)
    dtype = torch.float32 if step.cpu else torch.bfloat16
    model = random_llama(width, layers, step.device, dtype, vocabulary=32_000)
    batch = random_batch(lengths, 32_000, step.device)

    def plain() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    step.record(plain=profiled(step, plain))
    model.requires_grad_(False)
    for name, groups in (("all layers", "all"), ("embedding and head", ("embedding", "lm_head"))):
        recorder = GradNormRecorder(model, groups)
        step.record(**{name: profiled(step, lambda r=recorder: r.score(batch))})
    return True


if __name__ == "__main__":
    start(run)
