"""Step `capacity`: the largest model that this device scores whole, in bfloat16.

Layers as wide as a 70B Llama's, one sample of 4,096 tokens, norms of the embedding and the head,
without and with recomputed activations. The peaks of two and of four layers give the bytes of a
layer; the number that fits by them is tried, and fewer until one fits.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from step import Step, random_batch, random_llama, start, synchronised_clock

from grads_ds import GradNormRecorder

USABLE = 0.97  # of the free memory: the allocator leaves gaps
SMALL = {"width": 64, "inner": 96, "vocabulary": 128, "key_value_heads": 2}
LARGE = {"width": 8192, "inner": 28672, "vocabulary": 128_256, "key_value_heads": 8}


def scored(step: Step, layers: int, recomputed: bool) -> dict[str, Any]:
    """One scored sample: parameters, peak bytes (of parameters alone on a CPU), seconds."""
    shape, length = (SMALL, 32) if step.cpu else (LARGE, 4096)
    if not step.cpu:
        torch.cuda.reset_peak_memory_stats()
    model = random_llama(
        layers=layers, device=step.device, dtype=torch.bfloat16, **shape
    ).requires_grad_(False)
    if recomputed:
        model.activation_checkpointing_enable()
        model.train()  # it recomputes in this mode alone; a Llama has no dropout
    parameters = sum(p.numel() for p in model.parameters())
    recorder = GradNormRecorder(model, ("embedding", "lm_head"))
    batch = random_batch([length], shape["vocabulary"], step.device)
    recorder.score(batch)
    began = synchronised_clock(step.device)
    norms = recorder.score(batch).norms
    seconds = synchronised_clock(step.device) - began
    return {
        "layers": layers,
        "parameters": parameters,
        "peak": 2 * parameters if step.cpu else torch.cuda.max_memory_allocated(),
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "finite": all(bool(value.isfinite().all()) for value in norms.values()),
    }


def release(step: Step) -> None:
    """Give back what a model left."""
    gc.collect()
    if not step.cpu:
        torch.cuda.empty_cache()


def largest(step: Step, recomputed: bool) -> dict[str, Any]:
    """Two small models, then the largest that fits."""
    few = scored(step, 2, recomputed)
    release(step)
    more = scored(step, 4, recomputed)
    release(step)
    layer = (more["peak"] - few["peak"]) / 2
    room = 10 * layer if step.cpu else torch.cuda.mem_get_info()[0]
    count = int((room * USABLE - few["peak"]) / layer) + 2
    found = {"measured": [few, more], "bytes_of_a_layer": layer, "room": room, "expected": count}
    failed: list[int] = []
    while count > 4 and step.left() > 10:
        try:
            return found | {"largest": scored(step, count, recomputed), "out_of_memory": failed}
        except torch.OutOfMemoryError:
            failed.append(count)
        release(step)  # outside the handler, whose traceback holds the model
        count -= max(1, count // 30)
    return found | {"largest": None, "out_of_memory": failed}


def run(step: Step) -> bool:
    """Both ways."""
    for recomputed in (False, True):
        found = largest(step, recomputed)
        release(step)
        step.record(**{"recomputed" if recomputed else "kept": found})
    return all(way["largest"] and way["largest"]["finite"] for way in step.found.values())


if __name__ == "__main__":
    start(run)
