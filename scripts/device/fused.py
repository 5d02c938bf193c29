"""Step `fused`: the optimizers and attention kernels a GPU adds, each against the plain one.

DeepSpeed compiles its fused optimizers with nvcc the first time: the seconds are recorded, they are
what a first job waits. Attention: transformers' implementations by name, and the kernels of torch's
scaled dot product one by one, on a batch without and with padding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from step import Step, first_line, random_batch, random_llama, start, synchronised_clock
from torch.nn.attention import SDPBackend, sdpa_kernel

from grads_ds import GradNormRecorder
from grads_ds.distributed.compiled_ops import drop_letters

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
KERNELS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
LIMIT = 2e-2  # bfloat16


def optimizers(step: Step) -> dict[str, Callable[[list[torch.Tensor]], Any]]:
    """By name, what makes one of them; those that compile are left out on a CPU."""
    found: dict[str, Callable[[list[torch.Tensor]], Any]] = {
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.0, fused=True)
    }
    if not step.cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        drop_letters()  # as every rank of a job does

        found["DeepSpeed FusedAdam"] = lambda p: FusedAdam(p, lr=1e-3)
        found["DeepSpeed CPUAdam (offload)"] = lambda p: DeepSpeedCPUAdam(p, lr=1e-3)
    return found


def optimizer_case(step: Step, name: str, make: Callable[..., Any]) -> dict[str, Any]:
    """Seconds to make it and of a step, and how far three steps are from torch's own AdamW."""
    device = torch.device("cpu") if "offload" in name else step.device
    size, draw = 1000 if step.cpu else 2**26, torch.Generator(device).manual_seed(0)
    start_at = torch.randn(size, generator=draw, device=device)
    ours, plain = start_at.clone().requires_grad_(), start_at.clone().requires_grad_()
    reference = torch.optim.AdamW([plain], 1e-3, weight_decay=0.0, foreach=False)
    began = synchronised_clock(device)
    optimizer = make([ours])
    made = synchronised_clock(device)
    for _ in range(3):
        ours.grad = torch.randn(size, generator=draw, device=device)
        plain.grad = ours.grad.clone()
        reference.step()
        before = synchronised_clock(device)
        optimizer.step()
        after = synchronised_clock(device)
    error = float((ours - plain).detach().abs().max())
    return {
        "seconds_to_make": round(made - began, 2),
        "seconds_per_step": after - before,
        "parameters": size,
        "largest_difference": error,
        "ok": error < 1e-5,
    }


def attention_case(
    step: Step, attention: str, batch: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float]:
    """Norms of the batch with an implementation, and seconds of the second pass."""
    width, layers = (64, 1) if step.cpu else (1024, 8)
    model = random_llama(width, layers, step.device, torch.bfloat16, attention=attention)
    recorder = GradNormRecorder(model, "all")
    recorder.score(batch)
    began = synchronised_clock(step.device)
    norms = recorder.score(batch).norms
    return norms, synchronised_clock(step.device) - began


def attentions(step: Step, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every implementation and kernel on one batch, against eager attention."""
    truth, seconds = attention_case(step, "eager", batch)
    found: dict[str, Any] = {"eager": {"seconds": seconds, "ok": True}}
    names = ["sdpa", *PACKAGES]
    for name in [*names, *KERNELS]:
        told = name if isinstance(name, str) else f"sdpa {name.name}"
        package = PACKAGES.get(name) if isinstance(name, str) else None
        if package and importlib.util.find_spec(package) is None:
            found[told] = {"skipped": f"the package {package} is not installed", "ok": True}
            continue
        try:
            if isinstance(name, str):
                norms, seconds = attention_case(step, name, batch)
            else:
                with sdpa_kernel(name):
                    norms, seconds = attention_case(step, "sdpa", batch)
        except RuntimeError as error:  # this kernel does not take this batch
            refused = not isinstance(name, str)
            found[told] = {"failed": first_line(error), "ok": refused}
            continue
        error = max(float(((norms[g] - truth[g]).abs() / truth[g]).max()) for g in truth)
        found[told] = {"seconds": seconds, "difference": error, "ok": error <= LIMIT}
    return found


def run(step: Step) -> bool:
    """Attention first: it compiles nothing."""
    good = True
    lengths = [32] * 2 if step.cpu else [2048] * 4
    for name, rows in (
        ("no padding", lengths),
        ("padding", [lengths[0], *(length // 2 for length in lengths[1:])]),
    ):
        found = attentions(step, random_batch(rows, 4096, step.device))
        good &= all(entry["ok"] for entry in found.values())
        step.record(**{f"attention, {name}": found})
    for name, make in optimizers(step).items():
        try:
            facts = optimizer_case(step, name, make)
        except Exception as error:
            facts = {"failed": first_line(error), "ok": False}
        good &= facts["ok"]
        step.record(**{name: facts})
    if step.cpu:
        step.record(deepspeed_optimizers="skipped on a CPU: they are compiled for a minute")
    return good


if __name__ == "__main__":
    start(run)
