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

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm import frozen
from grads_ds.gradnorm.batch_layout import Layout, padded, read_layout, unpad
from grads_ds.gradnorm.formulas import sequence_shards
from grads_ds.gradnorm.formulas.head import DEFAULT_BUDGET, HeadPass
from grads_ds.gradnorm.groups import full_shape
from grads_ds.gradnorm.head_run import HeadRun
from grads_ds.gradnorm.one_sample import one_sample_norms
from grads_ds.gradnorm.results import GradNorms, References, summarise
from grads_ds.gradnorm.rules import plan_sites
from grads_ds.gradnorm.sharding import Gather, gather_of, unwrapped
from grads_ds.gradnorm.sites import Measurement
from grads_ds.gradnorm.while_training import TrainingRecorder


class GradNormRecorder:
    """Measures per-sample gradient norms of `model` for `layers`: "all", or any of embedding,
    lm_head, attention, mlp, norm, lora.

    loss_reduction: "mean" or "sum" of one sample's own target tokens. gather: makes parameters
    whole for a while (default: DeepSpeed's own way, where it has taken them apart). head_budget:
    largest number of logits held at a time. sequence_group: the process group of ranks that each
    hold a part of every sequence (Ulysses). Raises ValueError for models and layers that cannot be
    recorded.
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
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', found {loss_reduction!r}")
        model = unwrapped(model)
        self.model, self.loss_reduction, self.group = model, loss_reduction, sequence_group
        self.gather = gather or gather_of(model)
        self.plan = plan_sites(model, layers)
        self.head = HeadRun(
            model,
            self.plan,
            frozen.config_transform(model),
            self.gather,
            head_budget,
            sequence_group,
        )
        self.references = References({})
        # The head is run as the model runs it, with all its logits, where it is more than a matrix
        # or its logits are changed in a way not known here: exact all the same, only larger.
        self.plain_head = type(self.plan.head).forward is not nn.Linear.forward
        self._keeps_apart: bool | None = None
        self._watch: TrainingRecorder | None = None

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

        Only for parameters with a formula of their own. Over several ranks: average the results,
        weighted by samples.
        """
        shapes = {
            name: full_shape(p)
            for name, p in self.model.named_parameters()
            if name in self.plan.groups
        }
        direct = {
            name
            for site in self.plan.sites
            if site.rule != "local"
            for name in site.parameters.values()
        }
        device = next(self.model.parameters()).device
        sums = {
            name: torch.zeros(shape, device=device)
            for name, shape in shapes.items()
            if name in direct
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
        self.references = References.of(self.plan, gradients)

    def _score(self, batch: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> GradNorms:
        layout = read_layout(batch)
        if layout.packed_index is not None and not self._packs(layout):
            batch = padded(unpad(batch))
            layout = read_layout(batch)
        measurement = Measurement(self.plan, layout, self.gather, self.group)
        if self.group is not None and (
            "shift_labels" not in batch
            or "position_ids" not in batch
            or layout.packed_index is not None
        ):
            raise ValueError(
                "a part of a sequence needs shift_labels and position_ids, and no segment_ids"
            )
        measurement.references, measurement.gradients = self.references.gradients, gradients
        if self._watch is not None:
            self._watch.paused = True
        try:
            loss = (
                self._plain(layout, measurement)
                if self.plain_head
                else self._fused(layout, measurement)
            )
            self._one_by_one(batch, measurement)
        except frozen.UnknownLogits:
            self.plain_head = True
            return self._score(batch, gradients)
        finally:
            if self._watch is not None:
                self._watch.paused = False
        if self.group is not None:
            measurement.sums = sequence_shards.all_reduce_sum(measurement.sums, self.group)
            measurement.inner = sequence_shards.all_reduce_sum(measurement.inner, self.group)
            loss = sequence_shards.all_reduce_sum({"loss": loss}, self.group)["loss"]
        norms = summarise(self.plan, measurement, loss, self.references)
        if self.group is None:
            return norms
        counts = sequence_shards.all_reduce_sum(
            {"all": norms.num_tokens, "targets": norms.num_target_tokens}, self.group
        )
        return replace(norms, num_tokens=counts["all"], num_target_tokens=counts["targets"])

    def _packs(self, layout: Layout) -> bool:
        """Whether the model keeps packed samples apart; tried once.

        Rows of a model that does not are unpacked before they are scored.
        """
        if self._keeps_apart is None and layout.num_samples > layout.rows:
            self._keeps_apart = frozen.keeps_packed_apart(self.model, self.plan.head, layout)
        return self._keeps_apart is not False

    def _fused(self, layout: Layout, measurement: Measurement) -> Tensor:
        """The head at the target positions only; the backward starts behind it."""
        head_only = set(self.plan.requested) <= {"lm_head"} and not (
            self.plan.requested and self.plan.tied
        )
        sites = [site for site in self.plan.sites if site.module is not self.plan.head]
        taken: dict[str, Any] = {}

        def take(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                weights_S = self._sample_weights(layout)
                taken["hidden"], taken["pass"] = (
                    hidden,
                    self.head.run(hidden, measurement, weights_S, not head_only),
                )
                taken["logits"] = frozen.stand_in_logits(hidden)
            return taken["logits"].clone()

        with frozen.frozen(self.model), frozen.head_replaced(self.plan.head, take):
            if head_only:
                with torch.no_grad():
                    seen = self.model(**frozen.model_inputs(self.model, layout, self.group is None))
                    frozen.check_transform(self.head.transform, taken["logits"], seen)
            else:
                measurement.anchor = torch.zeros(
                    (), device=layout.input_ids.device, requires_grad=True
                )
                with torch.enable_grad(), measurement.attached(sites):
                    seen = self.model(**frozen.model_inputs(self.model, layout, self.group is None))
                    frozen.check_transform(self.head.transform, taken["logits"], seen)
                    hidden = taken.pop("hidden")
                    seed = torch.zeros_like(hidden).reshape(-1, hidden.shape[-1])
                    seed[layout.target_positions] = taken["pass"].dh.to(seed.dtype)
                    torch.autograd.backward([hidden], [seed.reshape(hidden.shape)])
        passed: HeadPass = taken["pass"]
        for local, squares in (
            ("weight", passed.weight_norm_squared),
            ("bias", passed.bias_norm_squared),
        ):
            name = self.head.name(local)
            if name is not None:
                measurement.add(name, squares)
                measurement.calls[name.rsplit(".", 1)[0]] = 1
        if passed.inner is not None:  # weight and bias together: they are one group
            measurement.add_inner(self.head.name("weight") or "", passed.inner)
        return passed.loss

    def _plain(self, layout: Layout, measurement: Measurement) -> Tensor:
        """The model as it is, logits included, and a backward from the sum of the losses."""
        if self.group is not None:
            raise ValueError(
                "under a sequence group the head must be a linear layer whose logits are changed in"
                " a known way"
            )
        weights_S = self._sample_weights(layout)
        losses = torch.zeros(
            layout.num_samples, dtype=torch.float64, device=layout.input_ids.device
        )
        if self.plan.tied:
            measurement.unmeasured.add(self.head.name("weight") or "")
        with frozen.frozen(self.model):
            measurement.anchor = torch.zeros((), device=layout.input_ids.device, requires_grad=True)
            with torch.enable_grad(), measurement.attached(self.plan.sites):
                logits = self.model(
                    **frozen.model_inputs(self.model, layout, self.group is None)
                ).logits
                rows = logits.reshape(-1, logits.shape[-1])[layout.target_positions]
                rows = rows.float() if rows.dtype != torch.float64 else rows
                each = (
                    nn.functional.cross_entropy(rows, layout.target_ids, reduction="none")
                    if len(rows)
                    else rows.sum(-1)
                )
                weighted = each * weights_S[layout.target_samples].to(each.dtype)
                (weighted.sum() + 0 * logits.sum()).backward()
        return losses.index_add_(0, layout.target_samples, weighted.detach().double())

    def _one_by_one(self, batch: Mapping[str, Tensor], measurement: Measurement) -> None:
        """Fills in what the rules left out.

        Under ZeRO-3 the ranks first agree on whether any of them needs it.
        """
        names = measurement.left_out()
        in_step = self.gather is not None and torch.distributed.is_initialized()
        if in_step:
            flags = torch.tensor(
                [name in names for name in sorted(self.plan.groups)],
                device=measurement.layout.input_ids.device,
            ).int()
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            names = [
                name
                for name, flag in zip(sorted(self.plan.groups), flags.tolist(), strict=True)
                if flag
            ]
        if not names:
            return
        if self.group is not None:
            raise ValueError(
                f"no rule measures {', '.join(names[:5])} ({len(names)} parameters) under a"
                " sequence group"
            )
        inexact = [
            name
            for name in names
            if name in measurement.references or name in measurement.gradients
        ]
        if inexact:
            raise ValueError(
                f"directions need a formula for every parameter; {', '.join(inexact[:5])} have none"
                " in this batch"
            )
        found = one_sample_norms(
            self.model, self.plan.embedding, names, unpad(batch), self.loss_reduction, in_step
        )
        measurement.sums.update(found)

    def _sample_weights(self, layout: Layout) -> Tensor:
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
        self._watch = TrainingRecorder(
            self.model,
            self.plan,
            self.head.transform,
            self.gather,
            self.references,
            self.head.unweighted,
        )
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
