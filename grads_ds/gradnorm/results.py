"""What a recorder returns, and the reference gradients it is compared with.

Frozen records and the sums that make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grads_ds.gradnorm.groups import OTHER
from grads_ds.gradnorm.rules import SitePlan
from grads_ds.gradnorm.sites import Measurement


@dataclass(frozen=True)
class GradNorms:
    """One micro-batch's result; S samples (rows, or segments of packed rows in reading order).

    loss: float64 [S], reduced over each sample's own target tokens. num_tokens, num_target_tokens:
    int64 [S]; no target: norms are 0. norms: group -> float64 [S], and "total" when all layers are
    recorded. A tied table is one parameter: "embedding" and "lm_head" are then both its norm, and
    "total" counts it once. inner_products, cosines: group -> float64 [S], with a reference set.
    """

    loss: Tensor
    num_tokens: Tensor
    num_target_tokens: Tensor
    norms: dict[str, Tensor]
    inner_products: dict[str, Tensor] = field(default_factory=dict)
    cosines: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class References:
    """Reference gradients by parameter name, and the norm of each group made of them."""

    gradients: dict[str, Tensor]
    norms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: SitePlan, gradients: Mapping[str, Tensor]) -> References:
        """Checks them against the plan.

        Raises ValueError for unknown names and for groups given in part.
        """
        unknown = sorted(set(gradients) - set(plan.groups))
        if unknown:
            raise ValueError(
                f"reference gradients of parameters that are not recorded: {', '.join(unknown[:5])}"
            )
        given = {plan.groups[name] for name in gradients}
        missing = [
            name for name, group in plan.groups.items() if group in given and name not in gradients
        ]
        if missing:
            raise ValueError(
                "a reference must hold every parameter of a group; missing:"
                f" {', '.join(missing[:5])}"
            )
        squares: dict[str, float] = {}
        for name, gradient in gradients.items():
            group = plan.groups[name]
            squares[group] = squares.get(group, 0.0) + float((gradient.double() ** 2).sum())
        return cls(dict(gradients), {group: value**0.5 for group, value in squares.items()})


def summarise(
    plan: SitePlan,
    measurement: Measurement,
    loss_S: Tensor,
    references: References,
    factor_S: Tensor | None = None,
) -> GradNorms:
    """Sums of squares per parameter -> norms per group.

    factor: what each sample's gradients are multiplied by.
    """
    layout = measurement.layout
    zero = torch.zeros(layout.num_samples, dtype=torch.float64, device=layout.input_ids.device)
    factor_S = zero + 1 if factor_S is None else factor_S
    squares: dict[str, Tensor] = {}
    inner: dict[str, Tensor] = {}
    for name, group in plan.groups.items():
        squares[group] = squares.get(group, zero) + measurement.sums.get(name, zero)
        if name in references.gradients:
            inner[group] = inner.get(group, zero) + measurement.inner.get(name, zero)
    norms = {group: value.clamp_min(0).sqrt() * factor_S.abs() for group, value in squares.items()}
    inner = {group: value * factor_S for group, value in inner.items()}
    cosines = {
        group: value / (norms[group] * references.norms[group]).clamp_min(1e-300)
        for group, value in inner.items()
    }
    if OTHER in plan.requested:
        norms["total"] = (
            torch.stack(list(squares.values())).sum(0).clamp_min(0).sqrt() * factor_S.abs()
        )
    for found in (norms, inner, cosines):
        if plan.tied and "embedding" in found:
            found["lm_head"] = found["embedding"]
    asked = (*plan.requested, "total")
    return GradNorms(
        loss_S,
        layout.token_counts,
        layout.target_counts,
        *({g: found[g] for g in asked if g in found} for found in (norms, inner, cosines)),
    )
