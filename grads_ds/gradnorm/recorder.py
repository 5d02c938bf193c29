"""GradNormRecorder: the norm of every sample's own gradient, for each group of parameters, of any
Hugging Face causal model.

    recorder = GradNormRecorder(model, layers=("embedding", "lm_head"))
    norms = recorder.score(batch)                  # frozen model: no weight gradients, no optimizer

    with recorder:                                 # while it trains, in anybody's loop
        for batch in batches:
            model(**batch).loss.backward()
            norms = recorder.collect()

Imports torch alone. A DeepSpeed engine (any ZeRO stage), or what Accelerate or
DistributedDataParallel made of the model, may be passed in the model's place; call `score` and
`collect` on all ranks then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.directions import ONLY, References
from grads_ds.gradnorm.formulas import sequence_shards
from grads_ds.gradnorm.formulas.head import DEFAULT_BUDGET
from grads_ds.gradnorm.formulas.head_sums import Watch
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.gradnorm.results import GradNorms
from grads_ds.gradnorm.scoring.head_run import HeadRun
from grads_ds.gradnorm.scoring.micro_batch import Scorer
from grads_ds.gradnorm.sharding import Gather, gather_of, unwrapped
from grads_ds.gradnorm.training.while_training import TrainingRecorder
from grads_ds.gradnorm.trial.site_plan import plan_sites


class GradNormRecorder:
    """Measures per-sample gradient norms of `model` for `layers`: "all", or any of embedding,
    lm_head, attention, mlp, norm, lora.

    Raises ValueError for models and layers that cannot be recorded.

    Args:
        model: a causal language model, or what a distributed trainer made of it.
        layers: groups of parameters.
        loss_reduction: "mean" or "sum" of one sample's own target tokens.
        gather: makes parameters whole for a while (default: DeepSpeed's own way, where it has taken
            them apart).
        head_budget: largest number of logits held at a time.
        sequence_group: the ranks that each hold a part of every sequence (Ulysses).
        check: holds one sample of the first batch of each kind against a backward of its own; what
            differs is measured one sample at a time, with a warning, or refused while training.
        tokens: `score` gives losses and norms token by token too.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | tuple[str, ...] | list[str] = ("embedding", "lm_head"),
        *,
        loss_reduction: str = "mean",
        gather: Gather | None = None,
        head_budget: int = DEFAULT_BUDGET,
        sequence_group: Any = None,
        check: bool = True,
        tokens: bool = False,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', found {loss_reduction!r}")
        if sequence_group is not None and tokens:
            raise ValueError("tokens=True: wanted whole sequences, found a sequence_group")
        model = unwrapped(model)
        self.model, self.loss_reduction, self.group = model, loss_reduction, sequence_group
        self.gather = gather or gather_of(model)
        self.plan = plan_sites(model, layers)
        self.references = References()
        self.scorer = Scorer(
            model,
            self.plan,
            HeadRun(self.gather, head_budget, sequence_group),
            self._sample_weights,
            loss_reduction,
            check,
            tokens,
        )
        self._watch: TrainingRecorder | None = None
        self._views: list[HeadView] = []

    def score(self, batch: Mapping[str, Tensor]) -> GradNorms:
        """Scores one micro-batch: input_ids, labels (-100 = no target) [B, T], optional
        attention_mask, position_ids, segment_ids.

        Runs the same forward and backward whatever the batch holds, so that ranks stay in step;
        parameters, their `.grad` and the model's mode are as before afterwards. Parameters no rule
        covers are measured one sample at a time. Under a sequence group each rank gives its part of
        every row, with position_ids and shift_labels (each position's own target) as DeepSpeed's
        UlyssesSPDataLoaderAdapter makes them, and gets the result of the whole.
        """
        return self._score(batch, {})

    def mean_gradient(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mean over all samples of their gradients, by parameter name, fp32: a reference for
        `set_reference`.

        Raises ValueError where a parameter has to be measured one sample at a time. Over several
        ranks: average the results, weighted by samples.
        """
        device = next(self.model.parameters()).device
        sums = {
            name: torch.zeros(full_shape(p), device=device)
            for name, p in self.model.named_parameters()
            if name in self.plan.groups
        }
        samples = 0
        for batch in batches:
            samples += len(self._score(batch, sums).loss)
        for name in sums if self.group is not None else ():
            torch.distributed.all_reduce(sums[name], group=self.group)
        return {name: total / max(1, samples) for name, total in sums.items()}

    def set_reference(self, gradients: Mapping[str, Tensor]) -> None:
        """From now on every result also holds each group's inner product and cosine with this
        gradient (by parameter name).

        A group is compared as a whole, so all of its parameters must be given; groups given in part
        raise ValueError.
        """
        self.set_references({ONLY: gradients})

    def set_references(self, named: Mapping[str, Mapping[str, Tensor]]) -> None:
        """As `set_reference`, with several gradients in one pass: `directions` of every result has
        each one's inner products and cosines under its name.

        Raises ValueError too where they are of different parameters.
        """
        self.references = References.of(self.plan, named)

    def record_error_norms(self) -> None:
        """From now on every result of `score` also holds error_norms (EL2N)."""
        self.scorer.head = replace(self.scorer.head, error_norms=True)

    def record_tokens(self) -> None:
        """From now on every result of `score` also holds losses and norms token by token.

        Raises ValueError under a sequence group.
        """
        if self.group is not None:
            raise ValueError("tokens: wanted whole sequences, found a sequence_group")
        self.scorer.tokens = True

    @contextlib.contextmanager
    def observing(
        self, watch: Callable[[Layout, int, LogitTransform], Watch] | None = None
    ) -> Iterator[list[HeadView]]:
        """While active, the list holds what the last scored batch showed at the model's head: one
        view, or several in the order of the samples where the batch was measured in parts.

        watch: makes what is shown the logits as they are computed (`HeadView.watch`), given the
        layout, the size of the vocabulary and the transform; none where the model's own head runs.
        """
        self._views, self.scorer.want_heads = [], True
        before = self.scorer.head
        self.scorer.head = replace(before, watch=watch)
        try:
            yield self._views
        finally:
            self._views, self.scorer.want_heads, self.scorer.head = [], False, before

    def _score(self, batch: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> GradNorms:
        if self._watch is not None:
            self._watch.paused = True
        try:
            norms = self.scorer.score(batch, self.references, gradients)
            self._views[:] = norms.heads
            return replace(norms, heads=())
        finally:
            if self._watch is not None:
                self._watch.paused = False

    def _sample_weights(self, layout: Layout) -> Tensor:
        """What each target of a sample weighs in the sample's loss, float64 [S]."""
        counts_S = layout.target_counts
        if self.loss_reduction == "sum":
            return torch.ones_like(counts_S, dtype=torch.float64)
        if self.group is not None:
            counts_S = sequence_shards.all_reduce_sum({"targets": counts_S}, self.group)["targets"]
        return 1 / counts_S.clamp_min(1).double()

    def __enter__(self) -> GradNormRecorder:
        if self._watch is not None:
            raise RuntimeError("this recorder is watching already; leave its `with` first")
        if self.group is not None:
            raise ValueError(
                "under a sequence group norms are measured by score(), not while training"
            )
        self._watch = TrainingRecorder(self.scorer, self.references)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def collect(self) -> GradNorms:
        """The norms of the micro-batch whose backward has just run, of each sample's own loss
        whatever the batch's reduction was.

        Raises RuntimeError if no backward ran, or if the loss was not a weighted sum of the labels'
        cross-entropies.
        """
        if self._watch is None:
            raise RuntimeError("collect() needs `with recorder:` around the forward and backward")
        return self._watch.collect(self._sample_weights)
