"""The sums of one micro-batch: squared norms per parameter as the backward goes, and what could not
be measured in this batch (nothing is left out in silence).

One `Measurement` lives for one micro-batch. The rules put into it what they read; it knows which
uses of a parameter belong together.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas import embedding, linear, sequence_shards
from grads_ds.gradnorm.measure.tap import tap
from grads_ds.gradnorm.sharding import Gather
from grads_ds.gradnorm.sites import Site, SitePlan

Parts = tuple[Tensor, ...]


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
        self.tied_name = plan.head_names.get("weight") if plan.tied else None
        self.sums: dict[str, Tensor] = {}
        self.unmeasured: set[str] = set()
        self.calls: Counter[tuple[str, str]] = Counter()  # of sites, in the forward
        # a module is run again by itself: what its children see is not the model's forward
        self.replaying = False
        # set while a frozen model is differentiated; starts_at_sites: from the first site on, not
        # from the embedding
        self.grad_root: Tensor | None = None
        self.starts_at_sites = False
        # [S, L, D], tied tables: see embedding.tied_cross_term
        self.head_rows: Tensor | None = None
        # parameter name -> its reference gradients, as many of each parameter
        self.references: Mapping[str, tuple[Tensor, ...]] = {}
        # parameter name -> where the batch's summed gradient is added
        self.gradients: dict[str, Tensor] = {}
        # parameter name -> [K, S], inner products with its K references
        self.inner: dict[str, Tensor] = {}
        self.want_tokens = self.want_heads = False
        self.token_sizes: dict[str, Tensor] = {}  # parameter name -> [S, L]
        self.head_sizes: Tensor | None = None  # [N], the same of the head, by target
        self._acts_gram = linear.ActsGram()
        self._uses: Counter[str] = Counter()  # of parameters, in the forward
        self._rules: dict[str, tuple[str, Any]] = {}
        # of parameters used several times: what has come back so far, and what to do when all has
        self._parts: dict[str, list[Parts]] = {}
        self._finish: dict[str, Callable[[list[Parts]], Tensor]] = {}

    # What the rules read, before and behind a module

    def called(self, site: Site) -> None:
        """Counts a call in the forward, and a use of each of the site's parameters."""
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs the forward again inside the backward
        self.calls[site.name, site.rule] += 1
        for name in set(site.parameters.values()):
            self._uses[name] += 1
            rule = (site.rule, site.details)
            if self._rules.setdefault(name, rule) != rule:
                self.unmeasured.add(name)  # a weight that is used in two ways
                self._parts.pop(name, None)

    def behind(
        self, site: Site, sink: Callable[[Parts, Parts], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Hooks a module that computes one tensor from one tensor: sink((gradient,), (input,))."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            if self.replaying:
                return output
            self.called(site)
            given = [value for value in (*args, *kwargs.values()) if value is not None]
            if len(given) != 1 or not all(isinstance(t, Tensor) for t in (given[0], output)):
                self.unmeasured.update(site.parameters.values())  # computes from more than one
                return output
            return tap((output,), (given[0],), sink, self.root_of_sites)[0]

        return self.hooked(site.module, hook)

    @contextlib.contextmanager
    def hooked(self, module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
        """In front of other hooks: DeepSpeed's gather a module's parameters before what stands
        behind them runs. A deep copy of the module made meanwhile carries the hook: it is no call
        of this module.
        """

        def own(called: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return hook(called, args, kwargs, output) if called is module else None

        handle = module.register_forward_hook(own, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def root_of_sites(self) -> Tensor | None:
        """What makes a site's output require grad, where nothing before the site does."""
        return self.grad_root if self.starts_at_sites else None

    def rows(self, site: Site, *tensors: Tensor) -> list[Tensor] | None:
        """The tensors by sample, [S, L, ...]; None, and the site unmeasured, if their rows cannot
        be told apart.
        """
        found = [self.layout.per_sample(tensor) for tensor in tensors]
        if any(tensor is None for tensor in found):
            self.unmeasured.update(site.parameters.values())
            return None
        return found  # type: ignore[return-value]

    # What they add

    def add(self, name: str, squares_S: Tensor) -> None:
        """Adds to a parameter's squared norm."""
        self.sums[name] = self.sums[name] + squares_S if name in self.sums else squares_S

    def add_inner(self, name: str, inner_KS: Tensor) -> None:
        """Adds to the inner products with the parameter's reference gradients."""
        self.inner[name] = self.inner[name] + inner_KS if name in self.inner else inner_KS

    def compare(self, name: str, product: Callable[[Tensor], Tensor]) -> None:
        """Adds product(R), [S], for every reference gradient R of the parameter."""
        if references := self.references.get(name):
            self.add_inner(name, torch.stack([product(reference) for reference in references]))

    def add_use(self, name: str, parts: Parts, finish: Callable[[list[Parts]], Tensor]) -> None:
        """One use of a parameter. When all of the forward's have come back, finish(parts of all)
        gives the squared norm of their sum, [S].
        """
        if name in self.unmeasured:
            return
        uses = self._parts.setdefault(name, [])
        uses.append(parts)
        self._finish[name] = finish
        if len(uses) >= self._uses[name]:
            self.add(name, finish(self._parts.pop(name)))

    def add_vector(self, name: str, gradient: Callable[[], Tensor]) -> None:
        """One use of a small parameter, by its gradient per sample, [S, *shape]."""
        found = gradient()
        self.add_use(name, (found,), lambda uses: self.squares(sum(part for (part,) in uses)))
        self.compare(name, lambda r: (found.double() * r.double()).flatten(1).sum(1))
        if name in self.gradients:
            self.gradients[name] += found.sum(0).to(self.gradients[name].dtype)

    def take(self, name: str, sample: int, gradient: Tensor) -> Tensor:
        """A parameter's whole gradient of one sample, [1, *shape]: adds to the inner product and to
        the summed gradient, and returns its squared norm, float64 [1].
        """

        def product(reference: Tensor) -> Tensor:
            inner_S = torch.zeros(
                self.layout.num_samples, dtype=torch.float64, device=gradient.device
            )
            inner_S[sample] = (gradient[0].double() * reference.double()).sum()
            return inner_S

        self.compare(name, product)
        if name in self.gradients:
            self.gradients[name] += gradient[0].to(self.gradients[name].dtype)
        return self.squares(gradient)

    def add_token_sizes(self, name: str, sizes_SL: Tensor) -> None:
        """The length of a parameter's gradient by token; of several uses, the root of the sum of
        squares.
        """
        before = self.token_sizes.get(name)
        self.token_sizes[name] = sizes_SL if before is None else torch.hypot(before, sizes_SL)

    def finish(self) -> None:
        """After the backward: uses that no gradient came back from are left out of the sums."""
        for name, uses in self._parts.items():
            self.add(name, self._finish[name](uses))
        self._parts.clear()

    def left_out(self) -> list[str]:
        """Parameters that were not measured: no rule held, or their module took no part in the
        forward as itself.
        """
        called = {
            name
            for site in self.plan.sites
            if (site.name, site.rule) in self.calls
            for name in site.parameters.values()
        }
        uncalled = set(self.plan.groups) - called - set(self.sums) - self.plan.unused
        return sorted(self.unmeasured | uncalled | self.plan.one_by_one)

    # Norms of this rank's samples, or its share of them where ranks share each sequence

    def squares(self, gradients_Sx: Tensor) -> Tensor:
        """Squared norms of gradients that are at hand, [S, ...] -> float64 [S]."""
        if self.group:
            return sequence_shards.shard_norm_squared(gradients_Sx, self.group)
        return linear.squares(gradients_Sx)

    def weight_squares(self, acts_SLI: Tensor, grads_SLO: Tensor) -> Tensor:
        """Squared norms of a linear layer's weight gradient, float64 [S]."""
        if self.group:
            return sequence_shards.weight_norm_squared(acts_SLI, grads_SLO, self.group)
        return linear.weight_norm_squared(acts_SLI, grads_SLO, self._acts_gram)

    def table_squares(self, ids_SL: Tensor, grads_SLD: Tensor, padding_idx: int | None) -> Tensor:
        """Squared norms of a table's gradient, float64 [S]."""
        if self.group:
            return sequence_shards.table_norm_squared(ids_SL, grads_SLD, padding_idx, self.group)
        return embedding.embedding_norm_squared(ids_SL, grads_SLD, padding_idx)
