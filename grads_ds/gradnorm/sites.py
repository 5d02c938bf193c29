"""Attaches taps to a model's modules and turns what they see into squared norms per parameter.

One `Measurement` lives for one micro-batch: it hooks the sites of a plan, collects float64 [S] sums
of squares by parameter name while the backward runs, and lists the parameters it could not measure
in this batch (never leaves one out in silence).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas import embedding, linear, norm, sequence_shards
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.lookup import LookupHook, looked_up, requiring_grad
from grads_ds.gradnorm.rerun import isolated, local_norms_squared
from grads_ds.gradnorm.rules import Site, SitePlan, parameter_at
from grads_ds.gradnorm.sharding import Gather, gathered
from grads_ds.gradnorm.tap import tap

_NUMBERED = re.compile(r"\.\d+(?=\.|$)")
_CACHES = ("past_key_values", "past_key_value")


class Measurement:
    """Squared norms of one micro-batch. `sums`: parameter name -> float64 [S]; `unmeasured`:
    parameters no rule could measure here.

    group: the ranks that share each sequence, if any; sums and inner products are then this rank's
    shares.
    """

    def __init__(
        self, plan: SitePlan, layout: Layout, gather: Gather | None, group: Any = None
    ) -> None:
        self.plan, self.layout, self.gather, self.group = plan, layout, gather, group
        self.sums: dict[str, Tensor] = {}
        self.unmeasured: set[str] = set()
        self.calls: dict[str, int] = {}
        self._acts_gram = linear.ActsGram()
        # a module is run again by itself: what its children see is not the model's forward
        self._replaying = False
        self.anchor: Tensor | None = None  # set while a frozen model is differentiated
        # [S, L, D], tied tables: see embedding.tied_cross_term
        self.head_rows: Tensor | None = None
        self.references: dict[str, Tensor] = {}  # parameter name -> reference gradient
        # parameter name -> where the batch's summed gradient is added
        self.gradients: dict[str, Tensor] = {}
        # parameter name -> [S], inner product with the reference
        self.inner: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def attached(self, sites: Sequence[Site]) -> Iterator[None]:
        """Hooks the sites for the duration. The model itself is unchanged afterwards."""
        with contextlib.ExitStack() as stack:
            source = self.plan.embedding
            if self.anchor is not None and not any(site.module is source for site in sites):
                stack.enter_context(looked_up(source, requiring_grad(self.anchor)))
            for site in sites:
                if site.rule == "embedding":
                    stack.enter_context(looked_up(site.module, self._lookup_hook(site)))
                elif site.rule == "local" and any(
                    m is self.plan.embedding or m is self.plan.head for m in site.module.modules()
                ):
                    # (nearly) the whole model: too much to be run again alone
                    self.unmeasured.update(site.parameters.values())
                else:
                    # In front of other hooks: DeepSpeed's gather a module's parameters before what
                    # stands behind them runs.
                    handle = site.module.register_forward_hook(
                        self._forward_hook(site), with_kwargs=True, prepend=True
                    )
                    stack.callback(handle.remove)
            yield

    def add(self, name: str, squares_S: Tensor) -> None:
        """Adds to a parameter's squared norm."""
        self.sums[name] = self.sums[name] + squares_S if name in self.sums else squares_S

    def add_inner(self, name: str, inner_S: Tensor) -> None:
        """Adds to the inner product with the parameter's reference gradient."""
        self.inner[name] = self.inner[name] + inner_S if name in self.inner else inner_S

    def squares(self, gradients_Sx: Tensor) -> Tensor:
        """Squared norms of gradients that are at hand, [S, ...] -> float64 [S]; under a sequence
        group this rank's share of them.
        """
        return (
            sequence_shards.shard_norm_squared(gradients_Sx, self.group)
            if self.group
            else linear.squares(gradients_Sx)
        )

    def _weight_squares(self, acts_SLI: Tensor, grads_SLO: Tensor) -> Tensor:
        if self.group:
            return sequence_shards.weight_norm_squared(acts_SLI, grads_SLO, self.group)
        return linear.weight_norm_squared(acts_SLI, grads_SLO, self._acts_gram)

    def _bias_squares(self, grads_SLO: Tensor) -> Tensor:
        if self.group:
            return sequence_shards.bias_norm_squared(grads_SLO, self.group)
        return linear.bias_norm_squared(grads_SLO)

    def _table_squares(self, ids_SL: Tensor, grads_SLD: Tensor, padding_idx: int | None) -> Tensor:
        if self.group:
            return sequence_shards.table_norm_squared(ids_SL, grads_SLD, padding_idx, self.group)
        return embedding.embedding_norm_squared(ids_SL, grads_SLD, padding_idx)

    def left_out(self) -> list[str]:
        """Parameters that were not measured: no rule held, or their module took no part in the
        forward as itself.
        """
        uncalled = {
            n
            for site in self.plan.sites
            if site.name not in self.calls
            for n in site.parameters.values()
        }
        return sorted(self.unmeasured | (uncalled - set(self.sums)))

    def _called(self, site: Site) -> None:
        """Counts calls in the forward.

        A second one would need the cross term of the two, which no formula here has.
        """
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs the forward again inside the backward
        self.calls[site.name] = self.calls.get(site.name, 0) + 1
        if self.calls[site.name] > 1:
            self.unmeasured.update(site.parameters.values())

    def _lookup_hook(self, site: Site) -> LookupHook:
        name = site.parameters["weight"]
        padding_idx = site.module.padding_idx
        if site.module.max_norm is not None or site.module.scale_grad_by_freq:
            raise ValueError(
                f"{site.name}: max_norm and scale_grad_by_freq make a sample's gradient depend on"
                " others; set neither"
            )

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            ids_SL, grads_SLD = (
                self.layout.per_sample(saved[0], False),
                self.layout.per_sample(grads[0], False),
            )
            if ids_SL is None or grads_SLD is None:
                self.unmeasured.add(name)
                return
            self.add(name, self._table_squares(ids_SL, grads_SLD, padding_idx))
            if site.module is self.plan.embedding and self.head_rows is not None:
                self.add(
                    name, embedding.tied_cross_term(ids_SL, grads_SLD, self.head_rows, padding_idx)
                )
            if name in self.references:
                self.add_inner(
                    name,
                    embedding.embedding_inner(
                        ids_SL, grads_SLD, self.references[name], padding_idx
                    ),
                )
            if name in self.gradients:
                embedding.add_embedding_gradient(
                    self.gradients[name], ids_SL, grads_SLD, padding_idx
                )

        def hook(ids: Tensor, output: Tensor) -> Tensor:
            if self._replaying:
                return output
            self._called(site)
            if ids.dim() == 2 and ids.shape == (1, self.layout.length) and self.layout.rows > 1:
                # one row of positions, broadcast to the batch later: spread it first, so that each
                # row has its own gradient
                ids, output = (
                    ids.expand(self.layout.rows, -1),
                    output.expand(self.layout.rows, -1, -1),
                )
            return tap((output,), (ids,), sink, self.anchor)[0]

        return hook

    def _forward_hook(self, site: Site) -> Callable[..., Any]:
        if site.rule == "local":
            return self._local_hook(site)
        sink = self._linear_sink(site) if site.rule == "linear" else self._norm_sink(site)

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            if self._replaying:
                return output
            self._called(site)
            acts = args[0] if args else next(iter(kwargs.values()))
            return tap((output,), (acts,), sink)[0]

        return hook

    def _rows(self, site: Site, *tensors: Tensor) -> list[Tensor] | None:
        # Rows routed to one module of a list inside a layer can happen to number B * T, in another
        # order: not read as the batch.
        flat_ok = len(_NUMBERED.findall(f".{site.name}")) < 2
        found = [self.layout.per_sample(tensor, flat_ok) for tensor in tensors]
        if any(tensor is None for tensor in found):
            self.unmeasured.update(site.parameters.values())
            return None
        return found  # type: ignore[return-value]

    def _linear_sink(self, site: Site) -> Callable[..., None]:
        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            rows = self._rows(site, saved[0], grads[0])
            if rows is None:
                return
            acts_SLI, grads_SLO = rows[0].flatten(1, -2), rows[1].flatten(1, -2)
            if "weight" in site.parameters:
                name = site.parameters["weight"]
                self.add(name, self._weight_squares(acts_SLI, grads_SLO))
                if name in self.references:
                    reference_OI = (
                        self.references[name].T if site.transposed else self.references[name]
                    )
                    self.add_inner(name, linear.weight_inner(acts_SLI, grads_SLO, reference_OI))
                if name in self.gradients:
                    gradient_OI = (
                        self.gradients[name].T if site.transposed else self.gradients[name]
                    )
                    linear.add_weight_gradient(gradient_OI, acts_SLI, grads_SLO)
            if "bias" in site.parameters:
                self.add(site.parameters["bias"], self._bias_squares(grads_SLO))
                self._direct(site.parameters["bias"], lambda: linear.accumulate(grads_SLO).sum(1))

        return sink

    def _norm_sink(self, site: Site) -> Callable[..., None]:
        dims = len(full_shape(site.module.weight))  # type: ignore[arg-type]

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            rows = self._rows(site, saved[0], grads[0])
            if rows is None:
                return
            if "weight" in site.parameters:
                scale = norm.scale_gradient(rows[0], rows[1], dims, site.eps, site.centred)
                self.add(site.parameters["weight"], self.squares(scale))
                self._direct(site.parameters["weight"], lambda: scale)
            if "bias" in site.parameters:
                shift = norm.shift_gradient(rows[1], dims)
                self.add(site.parameters["bias"], self.squares(shift))
                self._direct(site.parameters["bias"], lambda: shift)

        return sink

    def _direct(self, name: str, gradient: Callable[[], Tensor]) -> None:
        """Reference and summed gradient of a small parameter, from its gradient per sample, [S,
        *shape].
        """
        if name in self.references:
            products = gradient().double() * self.references[name].double()
            self.add_inner(name, products.flatten(1).sum(1))
        if name in self.gradients:
            self.gradients[name] += gradient().sum(0).to(self.gradients[name].dtype)

    def _local_hook(self, site: Site) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            if self._replaying:
                return output
            self._called(site)
            outputs = output if isinstance(output, tuple) else (output,)
            if not all(o is None or isinstance(o, Tensor) for o in outputs):
                # gradients may come back where no tap can be put
                self.unmeasured.update(site.parameters.values())
                return output
            which = [
                i
                for i, o in enumerate(outputs)
                if isinstance(o, Tensor) and o.is_floating_point() and o.requires_grad
            ]
            if not which or not torch.is_grad_enabled():
                return output
            leaves, structure = pytree.tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            device = outputs[which[0]].device.type
            mixed, kind = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

            def call(tensors: list[Tensor]) -> Any:
                values = list(constants)
                for place, tensor in zip(places, tensors, strict=True):
                    values[place] = tensor
                again_args, again_kwargs = pytree.tree_unflatten(values, structure)
                # else it would be filled twice
                again_kwargs = {k: None if k in _CACHES else v for k, v in again_kwargs.items()}
                with torch.autocast(device, kind, mixed):  # as the first time
                    return module.forward(*again_args, **again_kwargs)

            def sink(grads: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> None:
                reached = [
                    (position, grad)
                    for position, grad in zip(which, grads, strict=True)
                    if grad is not None
                ]
                self._replaying = True
                try:
                    with (
                        gathered(list(module.parameters(recurse=False)), self.gather),
                        isolated(module, call, list(saved)),
                    ):
                        own = {local: parameter_at(module, local) for local in site.parameters}
                        found = local_norms_squared(
                            module, own, call, list(saved), reached, self.layout, self.squares
                        )
                finally:
                    self._replaying = False
                if found is None:
                    self.unmeasured.update(site.parameters.values())
                    return
                for local, squares_S in found.items():
                    self.add(site.parameters[local], squares_S)

            tapped = tap(tuple(outputs[i] for i in which), tuple(leaves[i] for i in places), sink)
            if not isinstance(output, tuple):
                return tapped[0]
            replaced = list(output)
            for position, tensor in zip(which, tapped, strict=True):
                replaced[position] = tensor
            return tuple(replaced) if type(output) is tuple else type(output)(*replaced)

        return hook
