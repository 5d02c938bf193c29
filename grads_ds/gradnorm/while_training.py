"""Recording while a model trains: the same taps, on the forward and backward of the user's own
step.

The loss of the step weighs its tokens as it likes (mean over the batch, over several micro-batches,
scaled for fp16). What each sample was weighed by is read off the gradient of its logits, which for
cross-entropy is weight * (softmax - onehot), and divided out, so that the norms are those of the
sample's own loss. A loss of another form is refused. Where no logits are made (losses fused with
the head: TRL, Liger) the same is read off the gradient of the head's input, W^T weight * (softmax -
onehot).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout, read_layout
from grads_ds.gradnorm.formulas.head import HeadPass, LogitTransform
from grads_ds.gradnorm.formulas.linear import accumulate, bias_norm_squared, weight_norm_squared
from grads_ds.gradnorm.formulas.loss_weights import (
    expected_rows,
    sample_losses,
    weights_of_hidden,
    weights_of_logits,
)
from grads_ds.gradnorm.frozen import keeps_packed_apart
from grads_ds.gradnorm.results import GradNorms, References, summarise
from grads_ds.gradnorm.rules import SitePlan, head_name
from grads_ds.gradnorm.sharding import Gather
from grads_ds.gradnorm.sites import Measurement
from grads_ds.gradnorm.tap import tap


class TrainingRecorder:
    """Watches a model's training forwards and backwards until closed.

    run_head: the head's own pass over its input [B, T, D], with every target weighing 1, for steps
    that make no logits.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SitePlan,
        transform: LogitTransform,
        gather: Gather | None,
        references: References,
        run_head: Callable[[Tensor, Measurement], HeadPass],
    ) -> None:
        self.model, self.plan, self.transform, self.gather, self.references = (
            model,
            plan,
            transform,
            gather,
            references,
        )
        self.run_head = run_head
        self.paused = False
        self._packs: bool | None = None
        self.measurement: Measurement | None = None
        self.losses_S: Tensor | None = None  # sum over each sample's targets
        self.weights_S: Tensor | None = None
        self._logits_seen = False
        self._probes: tuple[Tensor, Tensor] | None = None
        self._hooks = contextlib.ExitStack()
        self._signature = inspect.signature(model.forward)
        # A function, not a bound method: deep copies of the model (an averaged copy, say) must not
        # copy this watch.
        self._handle = model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)

    def close(self) -> None:
        """Leaves the model as it was."""
        self._handle.remove()
        self._hooks.close()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.paused or model is not self.model:  # a deep copy of a model carries its hooks along
            return
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if self.weights_S is not None:
            raise RuntimeError(
                "call collect() after every backward; the last micro-batch's norms were not"
                " collected"
            )
        batch = self._signature.bind_partial(*args, **kwargs).arguments
        batch = {**batch, **batch.pop("kwargs", {}), **kwargs}
        if batch.get("labels") is None or batch.get("input_ids") is None:
            raise ValueError(
                "recording while training reads input_ids and labels from the model's arguments;"
                " both must be passed"
            )
        batch = {
            name: batch[name]
            for name in ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")
            if isinstance(batch.get(name), Tensor)
        }
        layout = read_layout(with_segments(batch))
        if layout.num_samples > layout.rows and self._packs is None:
            self.paused = True
            try:
                # "fused_lm_head": TRL's, under which a forward without labels fails
                inputs = {
                    name: value
                    for name, value in kwargs.items()
                    if name not in ("labels", "fused_lm_head")
                }
                self._packs = not args and keeps_packed_apart(
                    self.model, self.plan.head, layout, inputs
                )
            finally:
                self.paused = False
        if layout.num_samples > layout.rows and not self._packs:
            raise ValueError(
                "the samples of a packed row see each other in this model, so none has a gradient"
                " of its own; pass use_cache=False, train on padded rows, or score()"
            )
        self._hooks.close()
        measurement = self.measurement = Measurement(self.plan, layout, self.gather)
        measurement.references = self.references.gradients
        if not self.plan.embedding.weight.requires_grad:
            measurement.anchor = torch.zeros((), device=layout.input_ids.device, requires_grad=True)
        self.losses_S = self._probes = None
        self._logits_seen = False
        sites = [site for site in self.plan.sites if site.module is not self.plan.head]
        self._hooks.enter_context(measurement.attached(sites))
        for module, hook in (
            (self.plan.head, self._head_hook),
            (_backbone(self.model), self._backbone_hook),
        ):
            if module is not None:
                handle = module.register_forward_hook(hook, prepend=True)
                self._hooks.callback(handle.remove)

    def _head_hook(self, module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        measurement = self.measurement
        assert measurement is not None
        layout = measurement.layout
        if logits.shape[:2] != (layout.rows, layout.length):
            raise RuntimeError(
                f"the head gave {tuple(logits.shape)} for {layout.rows} x {layout.length} tokens;"
                " record without logits_to_keep"
            )
        self._logits_seen = True
        with torch.no_grad():
            rows_RV = logits.detach().reshape(-1, logits.shape[-1])
            losses_N, self.losses_S = sample_losses(rows_RV, layout, self.transform)
            self._probes = expected_rows(rows_RV, layout, losses_N, self.transform)

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            self._head_sink(saved[0], grads[0])

        return tap((logits,), (args[0],), sink)[0]

    def _backbone_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = (
            output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        )
        layout = self.measurement.layout  # type: ignore[union-attr]
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != (layout.rows, layout.length):
            return output
        mixed = torch.is_autocast_enabled(hidden.device.type)
        tapped = tap(
            (hidden,),
            (hidden,),
            lambda grads, saved: self._fused_head_sink(saved[0], grads[0], mixed),
        )[0]
        if isinstance(output, tuple):
            return (tapped, *output[1:])
        output["last_hidden_state"] = tapped
        return output

    def _fused_head_sink(self, hidden: Tensor, grads: Tensor, mixed: bool) -> None:
        """The head's norms and the samples' weights where no logits were made: by running the head
        again, at the targets only.

        The gradient that came back must be each sample's weight times that of its own loss, at its
        targets and nowhere else.
        """
        measurement, layout = self.measurement, self.measurement.layout  # type: ignore[union-attr]
        if self._logits_seen or measurement is None:
            return
        with torch.no_grad():
            passed = self.run_head(hidden, measurement)
            self.losses_S = passed.loss
            assert passed.dh is not None
            weights_S = self.weights_S = weights_of_hidden(
                grads.reshape(-1, grads.shape[-1]), layout, passed.dh, mixed
            )
            # The pass was made with weights of 1, and what is measured further down has the step's
            # own: bring it to those.
            for local, squares_S in (
                ("weight", passed.weight_norm_squared),
                ("bias", passed.bias_norm_squared),
            ):
                name = head_name(self.model, self.plan, local)
                if name:
                    measurement.add(name, squares_S * weights_S.square())
            if measurement.head_rows is not None:
                measurement.head_rows *= weights_S[:, None, None].to(measurement.head_rows.dtype)
            if passed.inner is not None:
                measurement.add_inner(
                    head_name(self.model, self.plan, "weight") or "", passed.inner * weights_S
                )

    def _head_sink(self, hidden: Tensor, grads: Tensor) -> None:
        measurement, layout = self.measurement, self.measurement.layout  # type: ignore[union-attr]
        assert measurement is not None and self._probes is not None
        grads_RV, hidden_RD = (
            grads.reshape(-1, grads.shape[-1]),
            hidden.reshape(-1, hidden.shape[-1]),
        )
        self.weights_S = weights_of_logits(grads_RV, layout, *self._probes)
        name, bias = (head_name(self.model, self.plan, local) for local in ("weight", "bias"))
        zero = torch.zeros(layout.num_samples, dtype=torch.float64, device=grads.device)
        weight_S, bias_S, inner_S = zero.clone(), zero.clone(), zero.clone()
        ids_SL = layout.per_sample(layout.input_ids)
        assert ids_SL is not None
        if self.plan.tied and name:
            measurement.head_rows = accumulate(hidden_RD).new_zeros(
                *ids_SL.shape, hidden_RD.shape[1]
            )
        for sample, (start, stop) in enumerate(layout.split_targets()):
            if stop == start:
                continue
            rows = layout.target_positions[start:stop]
            contiguous = int(rows[-1] - rows[0]) + 1 == len(rows)
            g_1tV = (grads_RV[rows[0] : rows[-1] + 1] if contiguous else grads_RV[rows])[None]
            h_1tD = (hidden_RD[rows[0] : rows[-1] + 1] if contiguous else hidden_RD[rows])[None]
            if name:
                weight_S[sample] = weight_norm_squared(h_1tD, g_1tV)[0]
                if name in measurement.references:
                    projected = accumulate(g_1tV[0]) @ measurement.references[name]
                    inner_S[sample] += (projected * h_1tD[0]).sum(dtype=torch.float64)
                if measurement.head_rows is not None:
                    measurement.head_rows[sample] = accumulate(
                        g_1tV[0][:, ids_SL[sample]]
                    ).T @ accumulate(h_1tD[0])
            if bias:
                bias_S[sample] = bias_norm_squared(g_1tV)[0]
                if bias in measurement.references:
                    inner_S[sample] += (accumulate(g_1tV[0]) @ measurement.references[bias]).sum(
                        dtype=torch.float64
                    )
        if name:
            measurement.add(name, weight_S)
            if name in measurement.references:
                measurement.add_inner(name, inner_S)
        if bias:
            measurement.add(bias, bias_S)

    def collect(self, own_weights: Callable[[Layout], Tensor]) -> GradNorms:
        """The last micro-batch's norms; see GradNormRecorder.collect."""
        measurement = self.measurement
        if measurement is None or self.weights_S is None or self.losses_S is None:
            raise RuntimeError(
                "no backward through the model's head was seen since the last collect()"
            )
        left_out = [
            name
            for name in measurement.left_out()
            if name not in _names(self.model, self.plan.head)
        ]
        if left_out:
            raise RuntimeError(
                f"no rule measures {', '.join(left_out[:5])} while training ({len(left_out)}"
                " parameters); record other layers, or use score(), which can"
            )
        layout = measurement.layout
        own_S = own_weights(layout)
        factor_S = torch.where(
            self.weights_S != 0, own_S / torch.where(self.weights_S != 0, self.weights_S, 1), 0
        )
        norms = summarise(self.plan, measurement, self.losses_S * own_S, self.references, factor_S)
        self._hooks.close()
        self.measurement = self.weights_S = self.losses_S = self._probes = None
        return norms


def _backbone(model: nn.Module) -> nn.Module | None:
    """The model without its head, by Hugging Face's name for it; its output's last hidden state is
    the head's input.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(inner, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not inner else None


def _names(model: nn.Module, module: nn.Module) -> set[str]:
    own = {id(p) for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in own}


def with_segments(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed rows given by restarting position_ids and no mask, as Hugging Face's collators give
    them: adds their segment_ids.
    """
    positions = batch.get("position_ids")
    if positions is None or "segment_ids" in batch or batch.get("attention_mask") is not None:
        return dict(batch)
    restarts = torch.zeros_like(positions)
    restarts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).long()
    return {**batch, "segment_ids": restarts.cumsum(-1)} if bool(restarts.any()) else dict(batch)
