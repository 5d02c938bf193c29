"""Per-sample gradient norm of an embedding table, never building the V x D table. Pure tensor
functions.

Shapes: S samples, L tokens of the longest sample, D width. Rows of padding must carry a zero
gradient. With e_t = dLoss/d(output row t), row v of the sample's gradient is sum over the tokens t
with id v of e_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grads_ds.gradnorm.formulas.linear import accumulate

_SPAN = 2**32  # beyond every id


def embedding_norm_squared(ids_SL: Tensor, grads_SLD: Tensor, padding_idx: int | None) -> Tensor:
    """sum_v ||sum_{t: x_t = v} e_t||^2 per sample, by a segment sum over equal (sample, id) pairs,
    sorted; nothing is read by the host.

    The row `padding_idx` gets no gradient, as in `torch.nn.functional.embedding`. Returns float64
    [S].
    """
    samples, length, width = grads_SLD.shape
    total_S = grads_SLD.new_zeros(samples, dtype=torch.float64)
    if samples * length == 0:
        return total_S
    sample_S1 = torch.arange(samples, device=ids_SL.device)[:, None]
    keys_R, order_R = torch.sort((ids_SL.long() + _SPAN * sample_S1).reshape(-1))
    slot_R = torch.zeros_like(keys_R)  # of the pairs, 0, 1, 2, ...
    slot_R[1:] = (keys_R[1:] != keys_R[:-1]).cumsum(0)
    grads = accumulate(grads_SLD).reshape(-1, width)
    rows_RD = torch.zeros_like(grads).index_add_(0, slot_R, grads[order_R])
    sizes_R = (rows_RD * rows_RD).sum(-1, dtype=torch.float64)
    keys_of_slot_R = torch.zeros_like(keys_R).scatter_(0, slot_R, keys_R)
    if padding_idx is not None:
        sizes_R = sizes_R.masked_fill(keys_of_slot_R % _SPAN == padding_idx, 0)
    return total_S.index_add_(0, keys_of_slot_R // _SPAN, sizes_R)


def tied_cross_term(
    ids_SL: Tensor, grads_SLD: Tensor, head_rows_SLD: Tensor, padding_idx: int | None
) -> Tensor:
    """2 <E, H> per sample, for a table that is both the embedding (gradient E) and the head
    (gradient H).

    head_rows[t] is row x_t of the sample's head gradient, sum_s g_s[x_t] h_s, so that <E, H> =
    sum_t e_t . head_rows[t]. Returns float64 [S], of either sign.
    """
    products_SL = (accumulate(grads_SLD) * accumulate(head_rows_SLD)).sum(-1, dtype=torch.float64)
    if padding_idx is not None:
        products_SL = products_SL.masked_fill(ids_SL == padding_idx, 0)
    return 2 * products_SL.sum(-1)


def embedding_inner(
    ids_SL: Tensor, grads_SLD: Tensor, reference_VD: Tensor, padding_idx: int | None
) -> Tensor:
    """<E, R> = sum_t e_t . R[x_t] per sample, for a reference gradient R. Returns float64 [S]."""
    return tied_cross_term(ids_SL, grads_SLD, reference_VD[ids_SL.long()], padding_idx) / 2


def add_embedding_gradient(
    gradient_VD: Tensor, ids_SL: Tensor, grads_SLD: Tensor, padding_idx: int | None
) -> None:
    """Adds the sum over samples of the table's gradient to `gradient_VD`, in its precision."""
    real_SL = (
        torch.ones_like(ids_SL, dtype=torch.bool) if padding_idx is None else ids_SL != padding_idx
    )
    gradient_VD.index_add_(0, ids_SL[real_SL].long(), grads_SLD[real_SL].to(gradient_VD.dtype))
