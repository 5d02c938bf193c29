"""The slow truth: every sample's gradient by a backward pass of its own. What all fast code is
tested against.

Reads a model and a batch, changes neither. Needs a whole (unpartitioned) model; run it in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import IGNORE_INDEX, unpad
from grads_ds.gradnorm.measure.frozen import takes
from grads_ds.gradnorm.results import GradNorms
from grads_ds.gradnorm.sites import SitePlan


def reference_gradients(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss_reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> list[tuple[float, dict[str, Tensor]]]:
    """For each sample its loss and the gradient of every parameter, by name; parameters it does not
    reach are zero.

    The sample is cut out of its row (no padding, no neighbours) and its loss is the mean, or sum,
    over its own target tokens.
    """
    model = copy.deepcopy(model).to(dtype).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    without_cache = {"use_cache": False} if takes(model, "use_cache") else {}
    results = []
    for input_ids, labels in unpad(batch):
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=input_ids[None], **without_cache).logits[0]
        logits = logits[-len(input_ids) :]  # without positions that the model adds in front
        keep = labels[1:] != IGNORE_INDEX
        losses = nn.functional.cross_entropy(
            logits[:-1][keep].to(dtype), labels[1:][keep], reduction="none"
        )
        loss = losses.sum() / (max(1, len(losses)) if loss_reduction == "mean" else 1)
        loss.backward()
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
        }
        results.append((loss.item(), grads))
    return results


def reference_norms(
    model: nn.Module,
    plan: SitePlan,
    batch: Mapping[str, Tensor],
    loss_reduction: str = "mean",
    dtype: torch.dtype = torch.float64,
) -> GradNorms:
    """What a recorder with this plan must find in the batch: losses and norms per group, float64
    [S], from whole gradients.
    """
    found = reference_gradients(model, batch, loss_reduction, dtype)
    names: dict[str, list[str]] = {}
    for parameter, group in plan.groups.items():
        names.setdefault(group, []).append(parameter)
    if plan.tied:
        names["lm_head"] = names["embedding"]
    squares = {
        group: [
            [gradients[name].double().square().sum() for name in names[group]]
            for _, gradients in found
        ]
        for group in names
        if group in plan.requested
    }
    if "other" in plan.requested:
        squares["total"] = [
            [g.double().square().sum() for g in gradients.values()] for _, gradients in found
        ]
    norms = {
        group: torch.stack([torch.stack(row).sum().sqrt() for row in rows])
        for group, rows in squares.items()
    }
    samples = unpad(batch)
    tokens = torch.tensor([len(ids) for ids, _ in samples])
    targets = torch.tensor([int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in samples])
    return GradNorms(
        torch.tensor([loss for loss, _ in found], dtype=torch.float64), tokens, targets, norms
    )
