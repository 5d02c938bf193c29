"""Tries a model on a micro-batch before it is measured: which module uses which parameter, whether
rows belong to the samples that their place says, what the model does to its logits.

Two forwards without gradients, the second with the tokens of some samples changed. What differs
from the plan made of the structure alone changes the plan: a parameter used in several places is
measured in the smallest module around them, run again by itself, or else one sample at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.measure.frozen import (
    config_transform,
    fitting_transform,
    frozen,
    head_replaced,
    is_plain_linear,
    logits_of,
    stand_in_logits,
)
from grads_ds.gradnorm.sites import SitePlan
from grads_ds.gradnorm.trial.call_log import CallLog
from grads_ds.gradnorm.trial.reassign import reassigned
from grads_ds.gradnorm.trial.row_checks import Checks


@dataclass(frozen=True)
class Trial:
    """plan: the plan as this kind of batch needs it. transform: what the model does to what its
    head gives, None: unknown. own_head: the head is no matrix, or the transform unknown, so that
    the model's own has to run. apart: no sample sees another. front: positions that the model adds
    in front of every row (prompt tuning), as its head shows them. unshifted: a training step's own
    loss takes labels[t] for the target of position t.
    """

    plan: SitePlan
    transform: LogitTransform | None
    own_head: bool
    apart: bool
    front: int = 0
    unshifted: bool = False


def try_model(model: nn.Module, plan: SitePlan, layout: Layout, inputs: Mapping[str, Any]) -> Trial:
    """Two forwards of the model with `inputs` (what it is called with; input_ids among them)."""
    touched_BT, other_ids = _changed_ids(layout)
    given: list[Tensor] = []
    known = config_transform(model)
    linear = is_plain_linear(plan.head)
    transform: LogitTransform | None = None

    def take(hidden: Tensor) -> Tensor:
        given.append(stand_in_logits(hidden))
        return given[-1].clone()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        given.append(output.detach().clone())

    def run(ids: Tensor) -> CallLog:
        nonlocal transform
        log = CallLog(model, plan.groups)
        given.clear()
        with frozen(model, checkpointing=False), torch.no_grad(), contextlib.ExitStack() as stack:
            if linear:
                stack.enter_context(head_replaced(plan.head, take))
            else:
                stack.callback(plan.head.register_forward_hook(keep).remove)
            with log.listening(model):
                output = model(**{**inputs, "input_ids": ids})
            if given:
                transform = fitting_transform(known, given[-1], logits_of(output))
        return log

    first, second = run(layout.input_ids), run(other_ids)
    longer = given[-1].shape[1] - layout.length if given and given[-1].dim() == 3 else 0
    front = max(0, longer) if layout.packed_index is None else 0
    touched_BT = nn.functional.pad(touched_BT, (front, 0))
    checks = Checks(layout.behind(front), touched_BT, first, second)
    head_call = next((call for call in first.calls if call.module is plan.head), None)
    apart = head_call is None or checks.right(head_call, "inputs")
    reassigned_plan = reassigned(model, plan, first, checks, replaced_head=linear)
    return Trial(reassigned_plan, transform, transform is None or not linear, apart, front)


def _changed_ids(layout: Layout) -> tuple[Tensor, Tensor]:
    """Which tokens are changed, bool [B, T], and the ids with them changed: those of the first
    sample of the batch, or of every row's first where rows are packed.
    """
    touched = torch.zeros_like(layout.real)
    if layout.packed_index is None:
        touched[0] = layout.real[0]
    else:
        index = layout.packed_index
        rows = torch.arange(layout.rows, device=index.device)
        owner = index[:, 0].clamp_min(0) // layout.length
        places = index[[int((owner == row).nonzero()[0]) for row in rows if (owner == row).any()]]
        touched.view(-1)[places[places >= 0]] = True
    values = layout.input_ids.unique()
    place = torch.searchsorted(values, layout.input_ids)
    other = values[(place + 1) % len(values)] if len(values) > 1 else layout.input_ids + 1
    return touched, torch.where(touched, other, layout.input_ids)
