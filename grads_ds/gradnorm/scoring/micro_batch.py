"""Scores one micro-batch: tries the model on every new kind of batch, measures, checks one sample,
and measures one sample at a time what no rule holds for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_kind import kind_of
from grads_ds.gradnorm.batch_layout import Layout, on_the_left, padded, read_layout, unpad
from grads_ds.gradnorm.directions import References
from grads_ds.gradnorm.formulas import sequence_shards
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.head_view import HeadView
from grads_ds.gradnorm.measure import frozen
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.results import GradNorms, joined, mean_of_targets, summarise, token_values
from grads_ds.gradnorm.scoring.forward_backward import TargetValues, score_frozen
from grads_ds.gradnorm.scoring.head_run import HeadRun
from grads_ds.gradnorm.scoring.in_step import Ranks
from grads_ds.gradnorm.scoring.one_sample import fill_in
from grads_ds.gradnorm.sharding import has_dtensors
from grads_ds.gradnorm.sites import SitePlan
from grads_ds.gradnorm.trial.guard import (
    Verdict,
    check_one_sample,
    refuse_loss,
    warn_one_by_one,
    warn_row_by_row,
)
from grads_ds.gradnorm.trial.try_model import Trial, try_model


class Scorer:
    """What is known of a model by kind of batch, and the steps of scoring one.

    Args:
        model: without wrappers.
        plan: what is measured, by the model's structure.
        head: how heads are run; its gather and group are everybody's.
        sample_weights: what each target of a sample weighs, float64 [S].
        loss_reduction: "mean" or "sum", as sample_weights has it.
        check: holds one sample of each kind of batch against a backward of its own.
        tokens: gives values token by token too.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SitePlan,
        head: HeadRun,
        sample_weights: Callable[[Layout], Tensor],
        loss_reduction: str,
        check: bool,
        tokens: bool,
    ) -> None:
        self.model, self.plan, self.head = model, plan, head
        self.sample_weights, self.loss_reduction = sample_weights, loss_reduction
        self.check, self.tokens = check, tokens
        self.want_heads = False
        self.trials: dict[Hashable, Trial] = {}
        self._checked: dict[Hashable, int] = {}  # how often each kind was
        self.row_by_row: set[Hashable] = set()

    def score(
        self, batch: Mapping[str, Tensor], references: References, gradients: dict[str, Tensor]
    ) -> GradNorms:
        """See GradNormRecorder.score. gradients: the summed gradients are added to these."""
        given = batch["input_ids"].shape
        if any(p.is_inference() for p in self.model.parameters()):
            raise ValueError(
                "the model was made under torch.inference_mode(), which autograd cannot follow;"
                " load it outside"
            )
        with torch.inference_mode(False):
            batch = {k: v.clone() if v.is_inference() else v for k, v in batch.items()}
            order = None
            if self.head.group is None:
                batch, order = on_the_left(batch)
            elif not {"shift_labels", "position_ids"} <= set(batch) or "segment_ids" in batch:
                raise ValueError(
                    "a part of a sequence needs shift_labels and position_ids, and no segment_ids"
                )
            found = self._score(batch, references, gradients)
        if found.tokens is not None:
            index = read_layout(batch).packed_index
            found = replace(found, tokens=found.tokens.placed(given, order, index))
        return found

    def _score(
        self, batch: Mapping[str, Tensor], references: References, gradients: dict[str, Tensor]
    ) -> GradNorms:
        batch, layout, kind = self._prepared(batch)
        ranks = self.ranks(layout)
        alone = layout.rows > 1 and (kind in self.row_by_row or not self.trials[kind].apart)
        passes = ranks.largest(layout.rows if alone else 1)
        if passes == 1:
            found = self._measured(batch, layout, kind, references, gradients)
            return found or self._score(batch, references, gradients)
        parts = [padded([sample]) for sample in unpad(batch)] if alone else [batch]
        results = []
        for turn in range(passes):
            # a rank with fewer parts than another scores its last again
            into = gradients if turn < len(parts) else {}
            results.append(self._score(parts[min(turn, len(parts) - 1)], references, into))
        return joined(results[: len(parts)])

    def ranks(self, layout: Layout) -> Ranks:
        """The ranks that must run as many forwards as this one."""
        group, device = self.head.group, layout.input_ids.device
        apart = self.head.gather is not None or has_dtensors(self.model)
        sharded = apart and torch.distributed.is_initialized()
        return Ranks(sharded or group is not None, device, None if sharded else group)

    def _prepared(
        self, batch: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], Layout, Hashable]:
        """The batch as the model can take it, its layout and kind, tried if it is new."""
        while True:
            layout = read_layout(batch)
            kind = kind_of(self.model, layout)
            trial = self.trials.get(kind)
            if trial is not None and not trial.apart and layout.packed_index is not None:
                batch = padded(unpad(batch))  # samples of a packed row see each other
                continue
            if not self.ranks(layout).largest(int(trial is None)):
                return batch, layout, kind
            if layout.packed_index is not None and not frozen.takes(self.model, "position_ids"):
                self.trials[kind] = Trial(self.plan, None, True, False)
                continue
            inputs = frozen.model_inputs(self.model, layout, self.head.group is None)
            self.trials[kind] = try_model(self.model, self.plan, layout, inputs)

    def _measured(
        self,
        batch: Mapping[str, Tensor],
        layout: Layout,
        kind: Hashable,
        references: References,
        gradients: dict[str, Tensor],
    ) -> GradNorms | None:
        """None where a check found, here or on another rank, that samples must be scored in another
        way: one row at a time, or by the model's own head.
        """
        ranks = self.ranks(layout)
        checks = self._must_check(layout, kind)
        measurement, values = self._frozen(layout, kind, references, {} if checks else gradients)
        if checks:
            loss_S = self.losses(layout, values)
            verdict = check_one_sample(self.model, measurement, batch, loss_S, self.loss_reduction)
            self._checked[kind] = self._checked.get(kind, 0) + (4 if verdict.checked else 1)
            differs = verdict.loss is not None
            if differs and layout.num_samples > 1:
                warn_row_by_row(verdict)
                self.row_by_row.add(kind)
            elif differs and self.trials[kind].own_head:
                refuse_loss(verdict)
            elif differs:  # the head's own pass gave another loss than the model's
                self.trials[kind] = replace(self.trials[kind], own_head=True)
                self._checked[kind] = 0
            if ranks.largest(int(differs)):
                return None
            if verdict.names:
                self._distrust(kind, verdict)
                measurement.unmeasured.update(verdict.names)
            if ranks.largest(int(bool(gradients))):  # nothing was added to them so far
                measurement, values = self._frozen(layout, kind, references, gradients)
        loss_S = self.losses(layout, values)
        fill_in(self.model, self.plan, measurement, batch, self.loss_reduction, ranks)
        if self.head.group is not None:
            measurement.sums = sequence_shards.all_reduce_sum(measurement.sums, self.head.group)
            measurement.inner = sequence_shards.all_reduce_sum(measurement.inner, self.head.group)
            loss_S = sequence_shards.all_reduce_sum({"loss": loss_S}, self.head.group)["loss"]
        norms = summarise(self.plan, measurement, loss_S, references)
        if values.error_norms is not None:
            norms = replace(norms, error_norms=mean_of_targets(layout, values.error_norms))
        if self.tokens:
            norms = replace(norms, tokens=token_values(self.plan, measurement, values.losses))
        if self.want_heads and values.hidden is not None:
            norms = replace(norms, heads=(self._view(measurement.layout, kind, values),))
        if self.head.group is None:
            return norms
        counts = sequence_shards.all_reduce_sum(
            {"all": norms.num_tokens, "targets": norms.num_target_tokens}, self.head.group
        )
        return replace(norms, num_tokens=counts["all"], num_target_tokens=counts["targets"])

    def _frozen(
        self, layout: Layout, kind: Hashable, references: References, gradients: dict[str, Tensor]
    ) -> tuple[Measurement, TargetValues]:
        trial = self.trials[kind]
        measured = layout.behind(trial.front)
        measurement = Measurement(trial.plan, measured, self.head.gather, self.head.group)
        measurement.references, measurement.gradients = references.gradients, gradients
        measurement.want_tokens, measurement.want_heads = self.tokens, self.want_heads
        inputs = frozen.model_inputs(self.model, layout, self.head.group is None)
        weights_S = self.sample_weights(layout)
        transform = None if trial.own_head else trial.transform
        try:
            values = score_frozen(self.model, measurement, self.head, inputs, weights_S, transform)
        except frozen.UnknownLogits:
            self.trials[kind] = replace(trial, own_head=True)
            return self._frozen(layout, kind, references, gradients)
        return measurement, values

    def _view(self, layout: Layout, kind: Hashable, values: TargetValues) -> HeadView:
        transform = self.trials[kind].transform or LogitTransform()
        assert values.hidden is not None
        return HeadView(
            layout,
            self.plan.head,
            values.hidden,
            values.logits,
            transform,
            self.head.gather,
            values.watch,
        )

    def losses(self, layout: Layout, values: TargetValues) -> Tensor:
        """Each sample's own loss, float64 [S]."""
        zero_S = torch.zeros(
            layout.num_samples, dtype=torch.float64, device=layout.input_ids.device
        )
        sums_S = zero_S.index_add_(0, layout.target_samples, values.losses)
        return sums_S * self.sample_weights(layout)

    def _must_check(self, layout: Layout, kind: Hashable) -> bool:
        # a rank whose first batches have no targets tries a few times, and all ranks with it
        if not self.checks:
            return False
        return bool(self.ranks(layout).largest(int(self._checked.get(kind, 0) < 4)))

    @property
    def checks(self) -> bool:
        """Whether samples are held against a backward of their own. FSDP2 would reduce it over the
        ranks, and a part of a sequence has none.
        """
        return self.check and self.head.group is None and not has_dtensors(self.model)

    def _distrust(self, kind: Hashable, verdict: Verdict) -> None:
        trial = self.trials[kind]
        names = trial.plan.one_by_one | set(verdict.names)
        self.trials[kind] = replace(trial, plan=replace(trial.plan, one_by_one=names))
        warn_one_by_one(verdict)
