"""The gradient of a module's own parameters, sample by sample, for a module of any kind: run it
again alone and differentiate.

Used where no formula is known (routers, fused experts, attention sinks). Exact for every module
whose output at a token is reached by the loss of that token's sample alone, which masks and the
order of a causal model guarantee.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.measure.run_again import Alone, left_as_it_was
from grads_ds.gradnorm.sites import Site

_AT_ONCE = 2**27  # elements of all samples' gradients that are held at once
# classes of modules that cannot be run for all samples at once
_NOT_AT_ONCE: set[type] = set()


def local_norms_squared(
    site: Site,
    own: dict[str, Tensor],
    call: Callable[[list[Tensor]], Any],
    inputs: list[Tensor],
    grads: list[tuple[int, Tensor]],
    layout: Layout,
    take: Callable[[str, int, Tensor], Tensor],
) -> dict[str, Tensor] | None:
    """Squared gradient norm per sample of each of the site's parameters. Returns float64 [S] by
    full name, or None if an output's rows cannot be told apart by sample.

    Args:
        site: the module; details False: its inputs are always given whole, since they cannot be
            told apart by sample.
        own: path in the module -> whole parameter.
        call: runs the module's forward on tensors standing in for `inputs`.
        inputs: the module's tensor inputs.
        grads: the gradients that came, each with the position in the module's (tuple of) outputs
            that it belongs to.
        layout: the micro-batch.
        take: is given a parameter's name, a sample and its gradient [1, ...], and returns the
            squared norm, float64 [1].
    """
    owners = [owner_mask(grad, layout) for _, grad in grads]
    if any(owner is None for owner in owners):
        return None
    # one stand-in for each parameter, wherever in the module it stands
    whole = {site.parameters[local]: tensor.detach() for local, tensor in own.items()}
    totals = {
        name: torch.zeros(layout.num_samples, dtype=torch.float64, device=layout.input_ids.device)
        for name in whole
    }
    alone = Alone(site, call, [position for position, _ in grads])
    if bool(site.details) and _splits(inputs, layout):
        found = _all_at_once(alone, whole, inputs, [grad for _, grad in grads], layout)
        for sample in range(layout.num_samples):
            if found is None:
                rows = [_rows_of(tensor, sample, layout) for tensor in inputs]
                parts = [_rows_of(grad, sample, layout) for _, grad in grads]
                gradients = alone.gradients(whole, rows, parts)
            else:
                gradients = {name: gradient[sample] for name, gradient in found.items()}
            for name, gradient in gradients.items():
                totals[name][sample] = take(name, sample, accumulate(gradient)[None])[0]
        return totals
    # the inputs stay whole: run once, and differentiated for each sample's rows of the outputs
    outputs, leaves = alone.outputs(whole, list(inputs))
    for sample in range(layout.num_samples):
        parts = []
        for (_, grad), owner in zip(grads, owners, strict=True):
            assert owner is not None
            here = (owner == sample).reshape(owner.shape + (1,) * (grad.dim() - owner.dim()))
            parts.append(grad * here)
        for name, gradient in alone.differentiated(outputs, leaves, parts).items():
            totals[name][sample] = take(name, sample, accumulate(gradient)[None])[0]
    return totals


def _all_at_once(
    alone: Alone,
    whole: dict[str, Tensor],
    inputs: list[Tensor],
    grads: list[Tensor],
    layout: Layout,
) -> dict[str, Tensor] | None:
    """Every sample's gradients in one run, [S, ...] by name; None where that would take much
    memory, or the module does what cannot be done for all samples at once (it looks at values).
    """
    if layout.rows * sum(tensor.numel() for tensor in whole.values()) > _AT_ONCE:
        return None
    if type(alone.site.module) in _NOT_AT_ONCE:
        return None
    moved = [_by_row(tensor, layout) for tensor in inputs]
    which = [None if tensor is None else 0 for tensor in moved]
    given = [tensor if own is None else own for tensor, own in zip(inputs, moved, strict=True)]

    def one(rows: list[Tensor], parts: list[Tensor]) -> dict[str, Tensor]:
        def outputs(tensors: dict[str, Tensor]) -> list[Tensor]:
            found = alone.run(tensors, rows)
            if any(o.shape != part.shape for o, part in zip(found, parts, strict=True)):
                raise RuntimeError("another shape than in the model's own forward")
            return found

        values, backward = torch.func.vjp(outputs, whole)
        matched = [p.to(v.dtype) for p, v in zip(parts, values, strict=True)]
        return backward(matched)[0]  # type: ignore[no-any-return]

    try:
        parts = [_by_row(grad, layout) for grad in grads]
        with torch.no_grad(), left_as_it_was(alone.site.module):
            return torch.func.vmap(one, (which, 0))(given, parts)  # type: ignore[no-any-return]
    except Exception:
        _NOT_AT_ONCE.add(type(alone.site.module))
        return None


def _by_row(tensor: Tensor, layout: Layout) -> Tensor | None:
    """[B, ...] or [B * T, ...] -> [B, 1, ...] or [B, T, ...]; None if it belongs to no sample."""
    if tensor.dim() and tensor.shape[0] == layout.rows:
        return tensor[:, None]
    if tensor.dim() and tensor.shape[0] == layout.rows * layout.length:
        return tensor.unflatten(0, (layout.rows, layout.length))
    return None


def shared_norms_squared(
    site: Site,
    own: dict[str, Tensor],
    call: Callable[[list[Tensor]], Any],
    inputs: list[Tensor],
    grads_Sx: Tensor,
    take: Callable[[str, int, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The same for a module whose one output, [1, ...], all samples share: run again once.

    grads_Sx: each sample's gradient of it, [S, ...]. The other arguments, and what comes back: see
    `local_norms_squared`.
    """
    alone = Alone(site, call, [0])
    whole = {site.parameters[local]: tensor.detach() for local, tensor in own.items()}
    outputs, leaves = alone.outputs(whole, inputs)
    zero_S = torch.zeros(len(grads_Sx), dtype=torch.float64, device=grads_Sx.device)
    totals = {name: zero_S.clone() for name in leaves}
    for sample in range(len(grads_Sx)):
        part = grads_Sx[sample].reshape(outputs[0].shape)
        for name, gradient in alone.differentiated(outputs, leaves, [part]).items():
            totals[name][sample] = take(name, sample, accumulate(gradient)[None])[0]
    return totals


def owner_mask(tensor: Tensor, layout: Layout) -> Tensor | None:
    """The sample of each leading row of `tensor`: [B, T] or [B * T]; None if its rows cannot be
    told apart.
    """
    rows, length = layout.rows, layout.length
    owner = torch.arange(rows, device=tensor.device)[:, None].expand(rows, length)
    if layout.packed_index is not None:
        index = layout.packed_index
        flat = torch.full((rows * length,), -1, dtype=torch.long, device=tensor.device)
        sample = torch.arange(layout.num_samples, device=tensor.device)[:, None].expand_as(index)
        flat[index[index >= 0]] = sample[index >= 0]
        owner = flat.reshape(rows, length)
    if tensor.shape[:2] == (rows, length):
        return owner
    if tensor.shape[0] == rows * length:
        return owner.reshape(-1)
    if layout.packed_index is None and tensor.dim() >= 2 and tensor.shape[0] == rows:
        return torch.arange(rows, device=tensor.device)
    if layout.num_samples == 1 and rows == 1:
        return torch.zeros((1,) * tensor.dim(), dtype=torch.long, device=tensor.device)
    return None


def _splits(inputs: list[Tensor], layout: Layout) -> bool:
    """Whether each input's rows can be told apart by sample, or it is shared by all samples."""
    rows, length = layout.rows, layout.length
    if layout.packed_index is not None or rows == 1 or rows == length:
        return False
    return all(
        not tensor.dim()
        or tensor.shape[0] not in (rows, rows * length)
        or tensor.shape[:2] in ((rows, length), (rows,))
        or tensor.shape[0] == rows * length
        or length in tensor.shape[2:]
        for tensor in inputs
    )


def _rows_of(tensor: Tensor, sample: int, layout: Layout) -> Tensor:
    """The part of an input that belongs to one row of the batch; tensors shared by all rows come
    back whole.
    """
    if tensor.dim() and tensor.shape[0] == layout.rows:
        return tensor[sample : sample + 1]
    if tensor.dim() and tensor.shape[0] == layout.rows * layout.length:
        return tensor[sample * layout.length : (sample + 1) * layout.length]
    return tensor
