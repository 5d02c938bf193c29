"""Attaches taps to a model's modules and turns what they see into squared norms per parameter.

One `Measurement` lives for one micro-batch: it hooks the sites of a plan, collects float64 [S] sums of squares by parameter name
while the backward runs, and lists the parameters it could not measure in this batch (never leaves one out in silence).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from grads_ds.gradnorm import embedding, linear, norm
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.layout import Layout
from grads_ds.gradnorm.local import local_norms_squared
from grads_ds.gradnorm.rules import Plan, Site
from grads_ds.gradnorm.tap import tap

Gather = Callable[[Sequence[nn.Parameter]], contextlib.AbstractContextManager[Any]]


class Measurement:
    """Squared norms of one micro-batch. `sums`: parameter name -> float64 [S]; `unmeasured`: parameters no rule could measure here;
    `called`: sites that took part in the forward."""

    def __init__(self, plan: Plan, layout: Layout, gather: Gather | None, skip: frozenset[str] = frozenset()) -> None:
        self.plan, self.layout, self.gather, self.skip = plan, layout, gather, skip
        self.sums: dict[str, Tensor] = {}
        self.unmeasured: set[str] = set()
        self.calls: dict[str, int] = {}
        self.anchor: Tensor | None = None  # set while a frozen model is differentiated
        self.head_rows: Tensor | None = None  # [S, L, D], tied tables: see embedding.tied_cross_term
        self.reference: Tensor | None = None  # [V, D] reference gradient of the embedding
        self.gradient: Tensor | None = None  # [V, D] summed gradient of the embedding is added here
        self.inner: dict[str, Tensor] = {}  # group -> [S]
        self.other_sinks: dict[nn.Module, Callable[..., None]] = {}

    @contextlib.contextmanager
    def attached(self, sites: Sequence[Site]) -> Iterator[None]:
        """Hooks the sites for the duration. The model itself is unchanged afterwards."""
        with contextlib.ExitStack() as stack:
            source = self.plan.embedding
            if self.anchor is not None and not any(site.module is source for site in sites):
                stack.enter_context(_looked_up(source, self._require_grad))
            for site in sites:
                if site.rule == "embedding":
                    stack.enter_context(_looked_up(site.module, self._lookup_hook(site)))
                else:
                    # In front of other hooks: DeepSpeed's gather a module's parameters before what stands behind them runs.
                    handle = site.module.register_forward_hook(self._forward_hook(site), with_kwargs=True, prepend=True)
                    stack.callback(handle.remove)
            yield

    def add(self, name: str, squares_S: Tensor) -> None:
        """Adds to a parameter's squared norm."""
        self.sums[name] = self.sums[name] + squares_S if name in self.sums else squares_S

    def _called(self, site: Site) -> None:
        """Counts calls in the forward. A second one would need the cross term of the two, which no formula here has."""
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs the forward again inside the backward
        self.calls[site.name] = self.calls.get(site.name, 0) + 1
        if self.calls[site.name] > 1:
            self.unmeasured.update(site.parameters.values())

    def _require_grad(self, ids: Tensor, output: Tensor, weight: Tensor) -> Tensor:
        return tap((output,), (), lambda grads, saved: None, self.anchor)[0]

    def _lookup_hook(self, site: Site) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        name = site.parameters["weight"]
        padding_idx = site.module.padding_idx
        if site.module.max_norm is not None or site.module.scale_grad_by_freq:
            raise ValueError(f"{site.name}: max_norm and scale_grad_by_freq make a sample's gradient depend on others; set neither")

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            ids_SL, grads_SLD = self.layout.per_sample(saved[0], False), self.layout.per_sample(grads[0], False)
            if ids_SL is None or grads_SLD is None:
                self.unmeasured.add(name)
                return
            self.add(name, embedding.embedding_norm_squared(ids_SL, grads_SLD, padding_idx))
            if site.module is not self.plan.embedding:
                return
            if self.head_rows is not None:
                self.add(name, embedding.tied_cross_term(ids_SL, grads_SLD, self.head_rows, padding_idx))
            real = ids_SL != padding_idx if padding_idx is not None else torch.ones_like(ids_SL, dtype=torch.bool)
            if self.reference is not None:
                rows_SLD = self.reference[ids_SL.long()] * real[..., None]
                self.inner["embedding"] = (grads_SLD.double() * rows_SLD.double()).sum((1, 2))
            if self.gradient is not None:
                self.gradient.index_add_(0, ids_SL[real].long(), grads_SLD[real].to(self.gradient.dtype))

        def hook(ids: Tensor, output: Tensor, weight: Tensor) -> Tensor:
            self._called(site)
            if ids.dim() == 2 and ids.shape == (1, self.layout.length) and self.layout.rows > 1:
                # one row of positions, broadcast to the batch later: spread it first, so that each row has its own gradient
                ids, output = ids.expand(self.layout.rows, -1), output.expand(self.layout.rows, -1, -1)
            return tap((output,), (ids,), sink, self.anchor)[0]

        return hook

    def _forward_hook(self, site: Site) -> Callable[..., Any]:
        if site.module in self.other_sinks:
            other = self.other_sinks[site.module]
            return lambda module, args, kwargs, output: tap((output,), (args[0],), other)[0]
        if site.rule == "local":
            return self._local_hook(site)
        sink = self._linear_sink(site) if site.rule == "linear" else self._norm_sink(site)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            self._called(site)
            acts = args[0] if args else next(iter(kwargs.values()))
            return tap((output,), (acts,), sink)[0]

        return hook

    def _rows(self, site: Site, *tensors: Tensor) -> list[Tensor] | None:
        # The rows routed to one expert of a list can happen to number B * T, in another order: never read those as the batch.
        flat_ok = "expert" not in site.name
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
                self.add(site.parameters["weight"], linear.weight_norm_squared(acts_SLI, grads_SLO))
            if "bias" in site.parameters:
                self.add(site.parameters["bias"], linear.bias_norm_squared(grads_SLO))

        return sink

    def _norm_sink(self, site: Site) -> Callable[..., None]:
        dims = len(full_shape(site.module.weight))  # type: ignore[arg-type]

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            rows = self._rows(site, saved[0], grads[0])
            if rows is None:
                return
            if "weight" in site.parameters:
                self.add(site.parameters["weight"], norm.scale_norm_squared(rows[0], rows[1], dims, site.eps, site.centred))
            if "bias" in site.parameters:
                self.add(site.parameters["bias"], norm.shift_norm_squared(rows[1], dims))

        return sink

    def _local_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self._called(site)
            outputs = output if isinstance(output, tuple) else (output,)
            which = [i for i, o in enumerate(outputs) if isinstance(o, Tensor) and o.is_floating_point() and o.requires_grad]
            if not which or not torch.is_grad_enabled():
                return output
            leaves, structure = pytree.tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

            def call(tensors: list[Tensor]) -> Any:
                values = list(constants)
                for place, tensor in zip(places, tensors, strict=True):
                    values[place] = tensor
                again_args, again_kwargs = pytree.tree_unflatten(values, structure)
                return module.forward(*again_args, **again_kwargs)

            def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
                parameters = [module._parameters[local] for local in site.parameters]
                with self.gather(parameters) if self.gather else contextlib.nullcontext():  # type: ignore[arg-type]
                    own = {local: module._parameters[local] for local in site.parameters}
                    found = local_norms_squared(module, own, call, list(saved), which, list(grads), self.layout)  # type: ignore[arg-type]
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


class _LookupMode(TorchFunctionMode):
    """Passes every table lookup through `hook(ids, output, weight)`; all other functions are left alone."""

    def __init__(self, hook: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.hook = hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.embedding:
            bound = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            return self.hook(bound["input"], output, bound["weight"])
        return output


@contextlib.contextmanager
def _looked_up(module: nn.Module, hook: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While active, the lookup inside `module` (scaled and offset subclasses too) goes through `hook`."""
    original, had_own = module.forward, "forward" in module.__dict__

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _LookupMode(hook):
            return original(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had_own:
            module.forward = original  # type: ignore[method-assign]
        else:
            del module.forward
