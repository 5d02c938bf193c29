"""One micro-batch on a frozen model: forward, the head at the target positions, and a backward of
activations that fills a Measurement.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas.error_norm import ErrorNorms
from grads_ds.gradnorm.formulas.head_sums import HeadPass, Watch
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.measure import frozen
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.rules.table import attached
from grads_ds.gradnorm.scoring.head_run import HeadRun


@dataclass(frozen=True)
class TargetValues:
    """Of each target, unweighted, float64 [N]: losses; error_norms on request. hidden [B, T, D]:
    the head's input (None where the head takes something else); logits [B, T, V] where the model's
    own head ran, and `watch`, which was shown them, where it did not.
    """

    losses: Tensor
    error_norms: Tensor | None
    hidden: Tensor | None
    logits: Tensor | None
    watch: Watch | None


def score_frozen(
    model: nn.Module,
    measurement: Measurement,
    head: HeadRun,
    inputs: Mapping[str, Any],
    weights_S: Tensor,
    transform: LogitTransform | None,
) -> TargetValues:
    """Fills the measurement. Raises UnknownLogits if the transform is another than is given.

    Args:
        model: whole or sharded; no parameter of it requires grad meanwhile.
        measurement: of this micro-batch, empty.
        head: how the head is run.
        inputs: what the model is called with.
        weights_S: what each target of a sample weighs in the sample's loss.
        transform: what the model does to the logits of its head; None runs the model's own head,
            with all its logits: exact all the same, only larger.
    """
    if transform is None:
        return _own_head(model, measurement, head, inputs, weights_S)
    return _fused_head(model, measurement, head, inputs, weights_S, transform)


def _fused_head(
    model: nn.Module,
    measurement: Measurement,
    head: HeadRun,
    inputs: Mapping[str, Any],
    weights_S: Tensor,
    transform: LogitTransform,
) -> TargetValues:
    """The head at the target positions only; the backward starts behind it."""
    plan, layout = measurement.plan, measurement.layout
    head_only = set(plan.requested) <= {"lm_head"} and not (plan.requested and plan.tied)
    taken: dict[str, Any] = {}

    def take(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != (layout.rows, layout.length):
            raise frozen.UnknownLogits("the head runs on other positions than the input's")
        with torch.no_grad():
            taken["hidden"] = hidden
            taken["seen"] = hidden.detach() if measurement.want_heads else None
            taken["pass"] = head.run(hidden, measurement, weights_S, transform, not head_only)
            taken["logits"] = frozen.stand_in_logits(hidden)
        return taken["logits"].clone()

    with frozen.frozen(model), frozen.head_replaced(plan.head, take):
        if head_only:
            with torch.no_grad():
                output = model(**inputs)
                frozen.check_transform(transform, taken["logits"], output)
        else:
            _set_grad_root(model, measurement)
            with torch.enable_grad(), attached(measurement, plan.body()):
                output = model(**inputs)
                frozen.check_transform(transform, taken["logits"], output)
                hidden = taken.pop("hidden")
                seed = torch.zeros_like(hidden).reshape(-1, hidden.shape[-1])
                seed[layout.target_positions] = taken["pass"].dh.to(seed.dtype)
                if hidden.requires_grad:
                    torch.autograd.backward([hidden], [seed.reshape(hidden.shape)])
        if "pass" not in taken:
            raise frozen.UnknownLogits("the head was not called as a module")
    measurement.finish()
    passed: HeadPass = taken["pass"]
    return TargetValues(passed.losses, passed.error_norms, taken["seen"], None, passed.watch)


def _own_head(
    model: nn.Module,
    measurement: Measurement,
    head: HeadRun,
    inputs: Mapping[str, Any],
    weights_S: Tensor,
) -> TargetValues:
    """The model as it is, logits included, and a backward from the sum of the losses."""
    plan, layout = measurement.plan, measurement.layout
    if measurement.group is not None:
        raise ValueError(
            "under a sequence group the head must be a linear layer whose logits are changed in a"
            " known way"
        )
    if measurement.tied_name:
        measurement.unmeasured.add(measurement.tied_name)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(t.detach() for t in (*args, *kwargs.values())[:1] if isinstance(t, Tensor))

    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen.frozen(model))
        stack.callback(plan.head.register_forward_pre_hook(keep, with_kwargs=True).remove)
        _set_grad_root(model, measurement)
        with torch.enable_grad(), attached(measurement, plan.sites):
            logits = frozen.logits_of(model(**inputs))
            if logits is None or logits.shape[:2] != (layout.rows, layout.length):
                raise ValueError(
                    f"wanted logits for {layout.rows} x {layout.length} positions, found"
                    f" {None if logits is None else tuple(logits.shape)} from"
                    f" {type(model).__name__}; a model that adds positions of its own (prompt"
                    " tuning) or leaves some out cannot be recorded"
                )
            rows_NV = accumulate(logits.reshape(-1, logits.shape[-1])[layout.target_positions])
            losses_N = (
                nn.functional.cross_entropy(rows_NV, layout.target_ids, reduction="none")
                if len(rows_NV)
                else rows_NV.sum(-1)
            )
            weighted_N = losses_N * weights_S[layout.target_samples].to(losses_N.dtype)
            seeded = weighted_N.sum() + 0 * logits.sum()
            if seeded.requires_grad:
                seeded.backward()
    measurement.finish()
    errors = None
    if head.error_norms:
        sums = ErrorNorms(layout.target_ids, rows_NV.detach())
        sums.add(rows_NV.detach(), 0)
        errors = sums.result()
    hidden = seen[0] if seen else None
    shown = logits.detach() if measurement.want_heads else None
    return TargetValues(losses_N.detach().double(), errors, hidden, shown, None)


def _set_grad_root(model: nn.Module, measurement: Measurement) -> None:
    """Where the backward ends: at the lowest module asked for, so that nothing below it is
    differentiated.

    At the embedding under ZeRO-3, whose hooks count on it, and under reentrant checkpointing, which
    needs inputs that require grad.
    """
    device = measurement.layout.input_ids.device
    measurement.grad_root = torch.zeros((), device=device, requires_grad=True)
    measurement.starts_at_sites = measurement.gather is None and not any(
        module.training for module in model.modules()
    )
