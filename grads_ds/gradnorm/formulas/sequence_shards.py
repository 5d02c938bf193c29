"""Norms of gradients whose samples are spread over a group of ranks, each with a part of every
sequence (Ulysses).

A sample's gradient is then the sum of the ranks' parts, and the norm of a sum is no sum of norms:
the parts are reduce-scattered, each rank squares the shard of the whole that it got, and the
squares are added up over the group at the end (`all_reduce_sum`). Blocks keep memory bounded
whatever the length. Every rank of the group must call with the same samples in the same order.

Shapes: S samples, L tokens here, n ranks, I inputs, O outputs, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grads_ds.gradnorm.formulas.embedding import embedding_norm_squared
from grads_ds.gradnorm.formulas.linear import accumulate, squares

_BLOCK = 2**26  # elements of a gradient that are held and reduced at a time


def shard_norm_squared(gradients_Sx: Tensor, group: Any) -> Tensor:
    """Squared norm of this rank's shard of the summed gradients, float64 [S]; over the group they
    add up to the whole's.
    """
    flat_SN = accumulate(gradients_Sx).flatten(1)
    ranks = dist.get_world_size(group)
    padded_SN = torch.nn.functional.pad(flat_SN, (0, -flat_SN.shape[1] % ranks))
    parts = padded_SN.reshape(len(flat_SN), ranks, -1).transpose(0, 1).contiguous()  # [n, S, N / n]
    shard = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(shard, parts.flatten(0, 1), group=group)
    return squares(shard)


def weight_norm_squared(acts_SLI: Tensor, grads_SLO: Tensor, group: Any) -> Tensor:
    """||sum over ranks of sum_t g_t a_t^T||^2 per sample, this rank's share of it, float64 [S]."""
    acts_SLI, grads_SLO = accumulate(acts_SLI), accumulate(grads_SLO)
    total_S = acts_SLI.new_zeros(len(acts_SLI), dtype=torch.float64)
    rows = max(1, _BLOCK // acts_SLI.shape[2])
    for sample in range(len(acts_SLI)):
        for row in range(0, grads_SLO.shape[2], rows):
            block = grads_SLO[sample, :, row : row + rows].T @ acts_SLI[sample]
            total_S[sample] += shard_norm_squared(block[None], group)[0]
    return total_S


def bias_norm_squared(grads_SLO: Tensor, group: Any) -> Tensor:
    """||sum over ranks of sum_t g_t||^2 per sample, this rank's share of it, float64 [S]."""
    return shard_norm_squared(accumulate(grads_SLO).sum(1), group)


def table_norm_squared(
    ids_SL: Tensor, grads_SLD: Tensor, padding_idx: int | None, group: Any
) -> Tensor:
    """The embedding's squared norm per sample over this rank's columns of the table, float64 [S].
    Each rank gets all tokens' gradients, in its columns only.
    """
    ranks = dist.get_world_size(group)
    grads_SLD = torch.nn.functional.pad(accumulate(grads_SLD), (0, -grads_SLD.shape[2] % ranks))
    columns = grads_SLD.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()  # [n, S, L, D / n]
    tokens = torch.empty_like(columns)
    dist.all_to_all_single(tokens, columns, group=group)
    return embedding_norm_squared(
        all_tokens(ids_SL, group), tokens.movedim(0, 1).flatten(1, 2), padding_idx
    )


def all_tokens(ids_SL: Tensor, group: Any) -> Tensor:
    """The group's ids side by side, [S, n L]."""
    found = [torch.empty_like(ids_SL) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, ids_SL.contiguous(), group=group)
    return torch.cat(found, 1)


def reduce_scatter(rows_SND: Tensor, group: Any) -> Tensor:
    """[S, n L, D], summed over the group -> this rank's tokens of it, [S, L, D]."""
    parts = rows_SND.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
    return own


def all_reduce_sum(values: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Every value, [S] each, summed over the group, in one reduction."""
    if not values:
        return values
    stacked = torch.stack([values[name] for name in sorted(values)])
    dist.all_reduce(stacked, group=group)
    return dict(zip(sorted(values), stacked, strict=True))


def all_reduce_max(count: int, device: torch.device, group: Any) -> int:
    """The largest of the ranks' counts."""
    found = torch.tensor([count], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)
