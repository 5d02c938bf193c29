"""What a recorder returns.

Frozen records and the sums that make them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.directions import ONLY, Direction, References
from grads_ds.gradnorm.groups import OTHER
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.sites import SitePlan


@dataclass(frozen=True)
class GradNorms:
    """One micro-batch's result; S samples (rows, or segments of packed rows in reading order).

    loss: float64 [S], reduced over each sample's own target tokens. num_tokens, num_target_tokens:
    int64 [S]; no target: norms are 0. norms: group -> float64 [S], and "total" when all layers are
    recorded. A tied table is one parameter: "embedding" and "lm_head" are then both its norm, and
    "total" counts it once. directions: against each reference that is set, by its name.
    error_norms: EL2N, the mean over a sample's targets of ||softmax - onehot||, float64 [S], on
    request; tokens: the same batch token by token, on request; heads: what the head took and gave,
    on request, in one or several parts.
    """

    loss: Tensor
    num_tokens: Tensor
    num_target_tokens: Tensor
    norms: dict[str, Tensor]
    directions: dict[str, Direction] = field(default_factory=dict)
    error_norms: Tensor | None = None
    tokens: TokenValues | None = None
    heads: tuple[HeadView, ...] = ()

    @property
    def inner_products(self) -> dict[str, Tensor]:
        """Group -> float64 [S], with the one reference of `set_reference`; empty without."""
        return self.directions[ONLY].inner_products if ONLY in self.directions else {}

    @property
    def cosines(self) -> dict[str, Tensor]:
        """Group -> float64 [S], with the one reference of `set_reference`; empty without."""
        return self.directions[ONLY].cosines if ONLY in self.directions else {}

    def cpu(self) -> GradNorms:
        """Losses, counts and norms on the host, in one transfer; the rest stays where it is."""
        kept = [self.loss, self.num_tokens, self.num_target_tokens, *self.norms.values()]
        loss, tokens, targets, *norms = torch.stack([value.double() for value in kept]).cpu()
        named = dict(zip(self.norms, norms, strict=True))
        counts = {"num_tokens": tokens.long(), "num_target_tokens": targets.long()}
        return replace(self, loss=loss, norms=named, **counts)


@dataclass(frozen=True)
class TokenValues:
    """Token by token, float64 [B, T], at the places of the batch as it was given.

    loss: the cross-entropy of predicting the token at that place, NaN where none is predicted.
    norms: "lm_head": of the gradient of that loss alone; "embedding": of the sample's whole loss
    with respect to the row looked up at that place, 0 at padding. Groups that are recorded only.
    """

    loss: Tensor
    norms: dict[str, Tensor]

    def placed(self, shape: torch.Size, order: Tensor | None, index: Tensor | None) -> TokenValues:
        """At the places of the batch as it was given, `shape` [B, T].

        order: where each token came from (see batch_layout.on_the_left). index: the batch's
        packed_index, for values that were measured one row per sample.
        """

        def place(values: Tensor, fill: float) -> Tensor:
            if index is not None and values.shape != shape:
                real, flat = index >= 0, values.new_full((shape.numel(),), fill)
                flat[index[real]] = values[:, : index.shape[1]][real]
                return flat.reshape(shape)
            wide = nn.functional.pad(values, (0, shape[1] - values.shape[1]), value=fill)
            return wide if order is None else torch.full_like(wide, fill).scatter(1, order, wide)

        return TokenValues(
            place(self.loss, math.nan), {name: place(v, 0.0) for name, v in self.norms.items()}
        )


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
    inner: dict[str, Tensor] = {}  # [K, S]
    none_KS = zero.repeat(len(references.names), 1)
    for name, group in plan.groups.items():
        squares[group] = squares.get(group, zero) + measurement.sums.get(name, zero)
        if name in references.gradients:
            inner[group] = inner.get(group, none_KS) + measurement.inner.get(name, none_KS)
    norms = {group: value.clamp_min(0).sqrt() * factor_S.abs() for group, value in squares.items()}
    inner = {group: value_KS * factor_S for group, value_KS in inner.items()}
    directions = references.directions(inner, norms)
    if OTHER in plan.requested:
        norms["total"] = (
            torch.stack(list(squares.values())).sum(0).clamp_min(0).sqrt() * factor_S.abs()
        )
    asked = (*plan.requested, "total")

    def shown(found: dict[str, Tensor]) -> dict[str, Tensor]:
        if plan.tied and "embedding" in found:
            found["lm_head"] = found["embedding"]
        return {group: found[group] for group in asked if group in found}

    directions = {
        reference: Direction(shown(found.inner_products), shown(found.cosines))
        for reference, found in directions.items()
    }
    return GradNorms(loss_S, layout.token_counts, layout.target_counts, shown(norms), directions)


def token_values(plan: SitePlan, measurement: Measurement, losses_N: Tensor) -> TokenValues:
    """Values by target and by sample -> by place, [B, T]."""
    layout = measurement.layout
    rows, length = layout.rows, layout.length
    loss = losses_N.new_full((rows * length,), math.nan)
    label_places = layout.target_positions + 1
    loss[label_places] = losses_N
    norms = {}
    if measurement.head_sizes is not None and "lm_head" in plan.requested:
        sizes = losses_N.new_zeros(rows * length)
        sizes[label_places] = measurement.head_sizes
        norms["lm_head"] = sizes.reshape(rows, length)[:, layout.front :]
    name = next((n for n, group in plan.groups.items() if group == "embedding"), "")
    if name in measurement.token_sizes and "embedding" in plan.requested:
        sizes_SL = measurement.token_sizes[name]
        if layout.packed_index is None:
            norms["embedding"] = sizes_SL
        else:
            real = layout.packed_index >= 0
            flat = sizes_SL.new_zeros(rows * length)
            flat[layout.packed_index[real]] = sizes_SL[real]
            norms["embedding"] = flat.reshape(rows, length)
    return TokenValues(loss.reshape(rows, length)[:, layout.front :], norms)


def joined(parts: Sequence[GradNorms]) -> GradNorms:
    """The results of several micro-batches as one; token by token, rows padded to the longest."""

    def cat(values: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(values))

    def by_name(values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: cat([v[name] for v in values]) for name in values[0]}

    tokens, errors = None, None
    if parts[0].tokens is not None:
        each = [part.tokens for part in parts if part.tokens is not None]
        longest = max(t.loss.shape[1] for t in each)
        each = [t.placed(torch.Size((len(t.loss), longest)), None, None) for t in each]
        tokens = TokenValues(cat([t.loss for t in each]), by_name([t.norms for t in each]))
    if parts[0].error_norms is not None:
        errors = cat([part.error_norms for part in parts if part.error_norms is not None])
    return GradNorms(
        cat([part.loss for part in parts]),
        cat([part.num_tokens for part in parts]),
        cat([part.num_target_tokens for part in parts]),
        by_name([part.norms for part in parts]),
        {
            name: Direction(
                by_name([part.directions[name].inner_products for part in parts]),
                by_name([part.directions[name].cosines for part in parts]),
            )
            for name in parts[0].directions
        },
        errors,
        tokens,
        tuple(view for part in parts for view in part.heads),
    )


def mean_of_targets(layout: Layout, values_N: Tensor) -> Tensor:
    """The mean over each sample's targets, float64 [S]."""
    total_S = values_N.new_zeros(layout.num_samples)
    total_S.index_add_(0, layout.target_samples, values_N)
    return total_S / layout.target_counts.clamp_min(1)
