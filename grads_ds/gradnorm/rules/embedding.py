"""Embedding tables: nn.Embedding and its subclasses, scaled or offset (the lookup itself is
intercepted).
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.formulas import embedding, linear
from grads_ds.gradnorm.measure.lookup import looked_up
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.measure.shared_tensor import SharedTensor
from grads_ds.gradnorm.measure.tap import tap
from grads_ds.gradnorm.sites import Site


def recognise(name: str, module: nn.Module, own: dict[str, str]) -> Site | None:
    """An embedding with its table alone.

    Raises ValueError where a sample's gradient would depend on others.
    """
    if not isinstance(module, nn.Embedding) or set(own) != {"weight"}:
        return None
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise ValueError(
            f"{name}: max_norm and scale_grad_by_freq make a sample's gradient depend on others;"
            " set neither"
        )
    return Site(name, module, "embedding", own)


def attach(site: Site, measurement: Measurement) -> AbstractContextManager[None]:
    """Reads the ids and the gradient of the rows looked up."""
    layout = measurement.layout

    def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
        rows = measurement.rows(site, saved[0][..., None], grads[0])
        if rows is None:
            return
        ids_SL, grads_SLD = rows[0].squeeze(-1).flatten(1), rows[1].flatten(1, -2)
        _table(site, measurement, ids_SL, grads_SLD)

    def spread(ids: Tensor, copies: Tensor | None) -> Tensor | None:
        if copies is None or copies.shape[:2] != (layout.rows, layout.length):
            measurement.unmeasured.update(site.parameters.values())  # used in another way
            return copies
        of_rows = ids.expand(layout.rows, -1)
        return tap((copies,), (of_rows,), sink, measurement.grad_root)[0]

    def hook(ids: Tensor, output: Tensor) -> Tensor:
        if measurement.replaying:
            return output
        measurement.called(site)
        if ids.dim() == 2 and ids.shape == (1, layout.length) and layout.rows > 1:
            # one row of positions, broadcast to the batch later: spread it first, so that each row
            # has its own gradient
            ids = ids.expand(layout.rows, -1)
            output = output.expand(layout.rows, -1, -1)
        if ids.shape == (layout.length,) and layout.rows > 1 and torch.is_grad_enabled():
            # positions without a row: each row has its own gradient where they are added to it
            return SharedTensor.of(output, lambda copies: spread(ids, copies))
        return tap((output,), (ids,), sink, measurement.grad_root)[0]

    return looked_up(site.module, hook)


def _table(site: Site, measurement: Measurement, ids_SL: Tensor, grads_SLD: Tensor) -> None:
    name, padding_idx = site.parameters["weight"], site.module.padding_idx
    layout = measurement.layout

    def norm_squared(uses: list[tuple[Tensor, ...]]) -> Tensor:
        ids, grads = (torch.cat(t, 1) if len(t) > 1 else t[0] for t in zip(*uses, strict=True))
        return measurement.table_squares(ids, grads, padding_idx)

    measurement.add_use(name, (ids_SL, grads_SLD), norm_squared)
    if measurement.want_tokens:
        sizes_SL = linear.accumulate(grads_SLD).norm(dim=-1).double()
        if padding_idx is not None:
            sizes_SL = sizes_SL.masked_fill(ids_SL == padding_idx, 0)
        measurement.add_token_sizes(name, sizes_SL)
    if name == measurement.tied_name and measurement.head_rows is not None:
        own_SL = layout.per_sample(layout.input_ids)
        own_SL = None if own_SL is None else own_SL[:, layout.front :]
        if own_SL is None or not torch.equal(own_SL, ids_SL):
            measurement.unmeasured.add(name)  # rows of the head were kept for the batch's ids
            return
        rows_SLD = measurement.head_rows[:, layout.front :]
        cross = embedding.tied_cross_term(ids_SL, grads_SLD, rows_SLD, padding_idx)
        measurement.add(name, cross)
    measurement.compare(
        name, lambda r: embedding.embedding_inner(ids_SL, grads_SLD, r, padding_idx)
    )
    if name in measurement.gradients:
        gradient = measurement.gradients[name]
        embedding.add_embedding_gradient(gradient, ids_SL, grads_SLD, padding_idx)
