"""The gradient of a module's own parameters, sample by sample, for a module of any kind: run it
again alone and differentiate.

Used where no formula is known (routers, fused experts, attention sinks). Exact for every module
whose output at a token is reached by the loss of that token's sample alone, which masks and the
order of a causal model guarantee.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.sites import Site, substituted


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
    owners = [_owner_mask(grad, layout) for _, grad in grads]
    if any(owner is None for owner in owners):
        return None
    split = bool(site.details) and _splits(inputs, layout)
    # one stand-in for each parameter, wherever in the module it stands
    whole = {site.parameters[local]: tensor for local, tensor in own.items()}
    totals = {
        name: torch.zeros(layout.num_samples, dtype=torch.float64, device=layout.input_ids.device)
        for name in whole
    }
    for sample in range(layout.num_samples):
        rows = [_rows_of(tensor, sample, layout) for tensor in inputs] if split else list(inputs)
        leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in whole.items()}
        stand_ins = {local: leaves[name] for local, name in site.parameters.items()}
        with torch.enable_grad(), substituted(site.module, stand_ins):
            outputs = call(rows)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        pairs = []
        for (position, grad), owner in zip(grads, owners, strict=True):
            if split:
                grad = _rows_of(grad, sample, layout)
            else:
                assert owner is not None
                here = (owner == sample).reshape(owner.shape + (1,) * (grad.dim() - owner.dim()))
                grad = grad * here
            if outputs[position].shape != grad.shape:
                raise RuntimeError(
                    f"{site.name} gave {tuple(outputs[position].shape)} when run again for one"
                    f" sample, where {tuple(grad.shape)} was expected; record it with other layers"
                    " left out"
                )
            if outputs[position].requires_grad:
                pairs.append((outputs[position], grad))
        if not pairs:
            continue
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(leaves.values()),
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            whole_gradient = torch.zeros_like(leaf) if gradient is None else gradient
            totals[name][sample] = take(name, sample, accumulate(whole_gradient)[None])[0]
    return totals


@contextlib.contextmanager
def isolated(
    module: nn.Module, call: Callable[[list[Tensor]], Any], inputs: list[Tensor]
) -> Iterator[None]:
    """While active, `module` can be run again any number of times without a word to those who hook
    its children.

    Where parameters of its children are taken apart (ZeRO-3), one ordinary run on `inputs` lets
    whoever took them apart make each whole in its turn, as in the recomputation of a checkpoint;
    copies of them serve the runs that follow. It is one run whatever the number of samples, so that
    ranks with more of them do not fall out of step.
    """
    children = [m for m in module.modules() if m is not module]
    kept = [(m, m._forward_pre_hooks, m._forward_hooks, dict(m._parameters)) for m in children]
    copies: dict[nn.Module, dict[str, Tensor]] = {}
    if any(
        p is not None and p.shape != full_shape(p) for _, _, _, own in kept for p in own.values()
    ):

        def copy(child: nn.Module, args: Any) -> None:
            copies[child] = {
                local: p.detach().clone() for local, p in child._parameters.items() if p is not None
            }

        handles = [m.register_forward_pre_hook(copy) for m in children]
        with torch.no_grad():
            call(inputs)
        for handle in handles:
            handle.remove()
    try:
        for m, *_ in kept:
            m._forward_pre_hooks, m._forward_hooks = OrderedDict(), OrderedDict()
            m._parameters.update(copies.get(m, {}))  # type: ignore[arg-type]
        yield
    finally:
        for m, before, after, own in kept:
            m._forward_pre_hooks, m._forward_hooks = before, after
            m._parameters.update(own)


def _owner_mask(tensor: Tensor, layout: Layout) -> Tensor | None:
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
