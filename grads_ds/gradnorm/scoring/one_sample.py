"""The universal path: one sample per forward and backward, autograd itself on the parameters that
no rule covers.

Exact for every model and parameter, and slow: it pays a whole forward and backward for each sample.
The gradient is read where autograd accumulates it, before anything could reduce it over ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import IGNORE_INDEX, read_layout
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.measure.frozen import frozen, model_inputs
from grads_ds.gradnorm.measure.lookup import looked_up, requiring_grad


def one_sample_norms(
    model: nn.Module,
    embedding: nn.Module,
    names: Sequence[str],
    samples: Sequence[tuple[Tensor, Tensor]],
    loss_reduction: str,
    in_step: bool,
) -> dict[str, Tensor]:
    """Squared gradient norm of each named parameter for each sample (input_ids, labels). Returns
    float64 [S] by name.

    in_step: every rank runs as many passes as the rank with most samples (ZeRO-3 gathers parameters
    in lockstep).
    """
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if name in set(names)
    }
    totals = {name: torch.zeros(len(samples), dtype=torch.float64) for name in parameters}
    passes = len(samples)
    if in_step and torch.distributed.is_initialized():
        most = torch.tensor([passes], device=samples[0][0].device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        passes = int(most)
    anchor = torch.zeros((), device=samples[0][0].device, requires_grad=True)
    with frozen(model), looked_up(embedding, requiring_grad(anchor)), _watched(parameters) as seen:
        for turn in range(passes):
            input_ids, labels = samples[min(turn, len(samples) - 1)]
            layout = read_layout({"input_ids": input_ids[None], "labels": labels[None]})
            with torch.enable_grad():
                logits = model(**model_inputs(model, layout)).logits[0]
                keep = labels[1:] != IGNORE_INDEX
                loss = nn.functional.cross_entropy(
                    accumulate(logits[:-1][keep]), labels[1:][keep], reduction="sum"
                )
            seen.clear()
            # Every rank must enter the backward, and all of it, also with nothing to predict.
            (
                loss / (max(1, int(keep.sum())) if loss_reduction == "mean" else 1)
                + 0 * logits.sum()
            ).backward()
            if turn < len(samples):
                for name, value in seen.items():
                    totals[name][turn] = value
    return {name: total.to(samples[0][0].device) for name, total in totals.items()}


@contextlib.contextmanager
def _watched(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Lets the parameters require grad, reads each gradient's square as it arrives and keeps none;
    `.grad` is as before after.
    """
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(True)

            def read(accumulated: Tensor, name: str = name) -> None:
                if accumulated.grad is not None:
                    grad = (
                        accumulated.grad.float()
                        if accumulated.grad.dtype != torch.float64
                        else accumulated.grad
                    )
                    seen[name] = (grad * grad).sum(dtype=torch.float64)
                    accumulated.grad = None

            handles.append(parameter.register_post_accumulate_grad_hook(read))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = kept[name]
