"""The slow truth: every sample's gradient by a backward pass of its own. What all fast code is tested against.

Reads a model and a batch, changes neither. Needs a whole (unpartitioned) model; run it in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.layout import IGNORED, cut_out


def reference_gradients(
    model: nn.Module, batch: Mapping[str, Tensor], loss_reduction: str = "mean", dtype: torch.dtype = torch.float64
) -> list[tuple[float, dict[str, Tensor]]]:
    """For each sample its loss and the gradient of every parameter, by name; parameters it does not reach are zero.

    The sample is cut out of its row (no padding, no neighbours) and its loss is the mean, or sum, over its own target tokens.
    """
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    results = []
    for input_ids, labels in cut_out(batch):
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=input_ids[None]).logits[0]
        keep = labels[1:] != IGNORED
        losses = nn.functional.cross_entropy(logits[:-1][keep].to(dtype), labels[1:][keep], reduction="none")
        loss = losses.sum() / (max(1, len(losses)) if loss_reduction == "mean" else 1)
        loss.backward()
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        results.append((loss.item(), grads))
    return results
