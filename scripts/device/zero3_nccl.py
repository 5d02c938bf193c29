"""Step `zero3_nccl`: DeepSpeed's ZeRO-3 with this device's collectives, on one rank.

A frozen engine without optimizer scores as the plain model does; a training engine records while it
trains, and its steps lower the loss. In float32 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from step import Step, first_line, random_batch, random_llama, start

from grads_ds import GradNormRecorder
from grads_ds.distributed import ranks

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
STEPS = 5


def settings(dtype: torch.dtype, training: bool) -> dict[str, Any]:
    """DeepSpeed's settings; every parameter of the model is sharded and gathered."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    found: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    found["bf16"] = {"enabled": dtype == torch.bfloat16}
    if training:
        found["zero_allow_untested_optimizer"] = True
    return found


def frozen_engine(step: Step, dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    """How far the scores of a ZeRO-3 engine are from those of the plain model."""
    import deepspeed

    width, layers = (64, 2) if step.cpu else (512, 6)
    model = random_llama(width, layers, step.device, dtype, tied=tied)
    batch = random_batch([24, 16] if step.cpu else [512, 300], 4096, step.device)
    plain = GradNormRecorder(model, "all").score(batch).norms
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=settings(dtype, False))
    shares = sum(p.ds_tensor.numel() for p in engine.module.parameters())
    scored = GradNormRecorder(engine, "all").score(batch).norms
    engine.optimizer.release_backward_leftovers()
    error = max(float(((scored[g] - plain[g]).abs() / plain[g]).max()) for g in plain)
    engine.destroy()
    return {"error": error, "sharded_elements": shares, "ok": error <= LIMITS[dtype]}


def training_engine(step: Step, dtype: torch.dtype) -> dict[str, Any]:
    """Norms recorded while a ZeRO-3 engine trains, against those scored before; its losses."""
    import deepspeed

    width, layers = (64, 2) if step.cpu else (512, 6)
    model = random_llama(width, layers, step.device, dtype).train()
    batch = random_batch([24, 16] if step.cpu else [512, 300], 4096, step.device)
    scored = GradNormRecorder(model, "all").score(batch).norms
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings(dtype, True)
    )
    losses, error = [], 0.0
    with GradNormRecorder(engine, "all") as recorder:
        for turn in range(STEPS):
            loss = engine(**batch).loss
            engine.backward(loss)
            recorded = recorder.collect().norms
            engine.step()
            losses.append(round(float(loss.detach()), 4))
            if turn == 0:
                error = max(
                    float(((recorded[g] - scored[g]).abs() / scored[g]).max()) for g in scored
                )
    engine.destroy()
    good = error <= LIMITS[dtype] and losses[-1] < losses[0]
    return {"error_while_training": error, "losses": losses, "ok": good}


def run(step: Step) -> bool:
    """Every case; one that raises is recorded and the others go on."""
    import torch.distributed as dist

    ranks.start()
    step.record(backend=dist.get_backend())
    total = torch.ones(4, device=step.device)
    dist.all_reduce(total)
    step.record(all_reduce=total.tolist())
    cases = {"frozen": lambda dtype: frozen_engine(step, dtype, False)}
    cases["frozen, tied"] = lambda dtype: frozen_engine(step, dtype, True)
    cases["training"] = lambda dtype: training_engine(step, dtype)
    good = True
    for dtype in LIMITS:
        for name, case in cases.items():
            try:
                facts = case(dtype)
            except Exception as error:
                facts = {"failed": first_line(error), "ok": False}
            good &= facts["ok"]
            step.record(**{f"{name}, {str(dtype)[6:]}": facts})
    ranks.finish()
    return good


if __name__ == "__main__":
    start(run)
