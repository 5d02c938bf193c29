"""GradNormRecorder: the norm of every sample's own gradient, for each group of parameters, of any Hugging Face causal model.

    recorder = GradNormRecorder(model, layers=("embedding", "lm_head"))
    norms = recorder.score(batch)                # frozen model: no weight gradients, no optimizer

Imports torch alone. Under ZeRO-3 pass `gather=lambda parameters: deepspeed.zero.GatheredParameters(parameters)` and
`engine.module` as the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm import frozen
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.head import DEFAULT_BUDGET, HeadPass, head_pass
from grads_ds.gradnorm.layout import Layout, read_layout
from grads_ds.gradnorm.rules import make_plan
from grads_ds.gradnorm.sites import Gather, Measurement


@dataclass(frozen=True)
class GradNorms:
    """One micro-batch's result; S samples (rows, or segments of packed rows in reading order).

    loss: float64 [S], reduced over each sample's own target tokens. num_target_tokens: int64 [S]; 0 means no target: norms are 0.
    norms: group -> float64 [S], and "total" when all layers are recorded. A tied table is one parameter: "embedding" and "lm_head"
    are then both its norm, and "total" counts it once.
    """

    loss: Tensor
    num_target_tokens: Tensor
    norms: dict[str, Tensor]
    inner_products: dict[str, Tensor] = field(default_factory=dict)
    cosines: dict[str, Tensor] = field(default_factory=dict)


class GradNormRecorder:
    """Measures per-sample gradient norms of `model` for `layers`: "all", or any of embedding, lm_head, attention, mlp, norm, lora.

    loss_reduction: "mean" or "sum" of one sample's own target tokens. gather: makes parameters whole for a while (ZeRO-3).
    head_budget: largest number of logits held at a time. Raises ValueError for models and layers that cannot be recorded.
    """

    def __init__(self, model: nn.Module, layers: str | tuple[str, ...] | list[str] = ("embedding", "lm_head"), *,
                 loss_reduction: str = "mean", gather: Gather | None = None, head_budget: int = DEFAULT_BUDGET) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', found {loss_reduction!r}")
        self.model, self.loss_reduction, self.gather, self.head_budget = model, loss_reduction, gather, head_budget
        self.plan = make_plan(model, layers)
        self.transform = frozen.config_transform(model)

    def score(self, batch: Mapping[str, Tensor]) -> GradNorms:
        """Scores one micro-batch: input_ids, labels (-100 = no target) [B, T], optional attention_mask, position_ids, segment_ids.

        Runs the same forward and backward whatever the batch holds, so that ranks stay in step; parameters are as before afterwards.
        """
        layout = read_layout(batch)
        measurement = Measurement(self.plan, layout, self.gather)
        head_only = set(self.plan.requested) <= {"lm_head"} and not self.plan.tied
        sites = [site for site in self.plan.sites if site.module is not self.plan.head]
        taken: dict[str, Any] = {}

        def take(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                taken["hidden"], taken["pass"] = hidden, self._head_pass(hidden, layout, measurement, not head_only)
                measurement.head_rows = taken["pass"].rows
                taken["logits"] = frozen.stand_in_logits(hidden)
            return taken["logits"].clone()

        with frozen.frozen(self.model), frozen.head_replaced(self.plan.head, take):
            if head_only:
                with torch.no_grad():
                    seen = self.model(**frozen.model_inputs(self.model, layout))
            else:
                device = layout.input_ids.device
                measurement.anchor = torch.zeros((), device=device, requires_grad=True)
                with torch.enable_grad(), measurement.attached(sites):
                    seen = self.model(**frozen.model_inputs(self.model, layout))
                    frozen.check_transform(self.transform, taken["logits"], seen)
                    hidden, passed = taken["hidden"], taken["pass"]
                    seed = torch.zeros_like(hidden).reshape(-1, hidden.shape[-1])
                    seed[layout.target_positions] = passed.dh.to(seed.dtype)
                    del seen
                    torch.autograd.backward([hidden], [seed.reshape(hidden.shape)])
        return self._result(layout, measurement, taken["pass"])

    def _head_pass(self, hidden: Tensor, layout: Layout, measurement: Measurement, want_dh: bool) -> HeadPass:
        head: Any = self.plan.head
        flat = hidden.reshape(-1, hidden.shape[-1])[layout.target_positions]
        own = [p for p in head.parameters(recurse=False)]
        # DeepSpeed's own hook has gathered the head by now; gather again only where nothing did.
        whole = all(p.shape == full_shape(p) for p in own)
        with contextlib.nullcontext() if whole or self.gather is None else self.gather(own):
            row_ids = layout.per_sample(layout.input_ids) if self.plan.tied else None
            return head_pass(
                flat, head.weight, head.bias, layout.target_ids, layout.split_targets(), self._sample_weights(layout),
                transform=self.transform, want_norm="lm_head" in self.plan.groups.values() or self.plan.tied, want_dh=want_dh,
                row_ids_SL=row_ids, budget=self.head_budget)

    def _sample_weights(self, layout: Layout) -> Tensor:
        if self.loss_reduction == "sum":
            return torch.ones(layout.num_samples, dtype=torch.float64, device=layout.input_ids.device)
        return 1 / layout.target_counts.clamp_min(1).double()

    def _result(self, layout: Layout, measurement: Measurement, passed: HeadPass) -> GradNorms:
        names = {id(p): name for name, p in self.model.named_parameters()}
        head: Any = self.plan.head
        if names.get(id(head.weight)) in self.plan.groups:
            measurement.add(names[id(head.weight)], passed.weight_norm_squared)
        if head.bias is not None and names.get(id(head.bias)) in self.plan.groups:
            measurement.add(names[id(head.bias)], passed.bias_norm_squared)
        return GradNorms(passed.loss, layout.target_counts, self._norms(measurement))

    def _norms(self, measurement: Measurement) -> dict[str, Tensor]:
        device = measurement.layout.input_ids.device
        zero = torch.zeros(measurement.layout.num_samples, dtype=torch.float64, device=device)
        squares: dict[str, Tensor] = {}
        for name, group in self.plan.groups.items():
            squares[group] = squares.get(group, zero) + measurement.sums.get(name, zero)
        norms = {group: value.clamp_min(0).sqrt() for group, value in squares.items()}
        if "other" in self.plan.requested:
            norms["total"] = torch.stack(list(squares.values())).sum(0).clamp_min(0).sqrt()
        if self.plan.tied and "lm_head" in self.plan.requested:
            norms["lm_head"] = norms["embedding"]
        return {group: norms[group] for group in (*self.plan.requested, "total") if group in norms}
