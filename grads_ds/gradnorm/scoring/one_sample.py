"""The universal path: one sample per forward and backward, autograd itself on the parameters that
no rule covers.

Exact for every model and parameter, and slow: it pays a whole forward and backward for each sample.
The gradient is read where autograd accumulates it, before anything could reduce it over ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import IGNORE_INDEX, read_layout, unpad
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.measure.frozen import frozen, model_inputs
from grads_ds.gradnorm.measure.lookup import looked_up, requiring_grad
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.scoring.in_step import Ranks
from grads_ds.gradnorm.sharding import has_dtensors
from grads_ds.gradnorm.sites import SitePlan


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
                logits = model(**model_inputs(model, layout)).logits[0, -len(input_ids) :]
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


def fill_in(
    model: nn.Module,
    plan: SitePlan,
    measurement: Measurement,
    batch: Mapping[str, Tensor],
    loss_reduction: str,
    ranks: Ranks,
) -> None:
    """Measures what the rules left out of a batch. Ranks first agree on whether any needs it.

    Raises ValueError where whole gradients are wanted, or sequences are shared.

    Args:
        model: that was measured.
        plan: of all that is recorded.
        measurement: of this batch, finished; its sums are completed.
        batch: input_ids, labels and what else the layout was read from.
        loss_reduction: "mean" or "sum" over a sample's targets.
        ranks: those that go in step.
    """
    names = ranks.any_of(measurement.left_out(), sorted(plan.groups))
    if not names:
        return
    if measurement.group is not None:
        raise ValueError(
            f"no rule measures {', '.join(names[:5])} ({len(names)} parameters) under a sequence"
            " group"
        )
    if has_dtensors(model):
        raise ValueError(
            f"no rule measures {', '.join(names[:5])} ({len(names)} parameters), and FSDP2 gives no"
            " sample's gradient by itself; record other layers"
        )
    inexact = [n for n in names if n in measurement.references or n in measurement.gradients]
    if inexact:
        raise ValueError(
            f"directions need a formula for every parameter; {', '.join(inexact[:5])} have none in"
            " this batch"
        )
    measurement.sums.update(
        one_sample_norms(model, plan.embedding, names, unpad(batch), loss_reduction, ranks.together)
    )


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
