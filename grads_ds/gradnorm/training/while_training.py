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

from grads_ds.gradnorm.batch_kind import kind_of
from grads_ds.gradnorm.batch_layout import Layout, read_layout
from grads_ds.gradnorm.directions import References
from grads_ds.gradnorm.measure.frozen import is_plain_linear
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.measure.tap import tap
from grads_ds.gradnorm.results import GradNorms, summarise
from grads_ds.gradnorm.rules.table import attached
from grads_ds.gradnorm.scoring.micro_batch import Scorer
from grads_ds.gradnorm.training.training_head import TrainingHead
from grads_ds.gradnorm.training.training_trial import as_the_loss_reads, tried_for_training

_OF_THE_LAYOUT = ("input_ids", "labels", "attention_mask", "position_ids", "segment_ids")


class TrainingRecorder:
    """Watches a model's training forwards and backwards until closed.

    scorer: what is known of the model, by kind of batch.
    """

    def __init__(self, scorer: Scorer, references: References) -> None:
        self.scorer, self.model, self.references = scorer, scorer.model, references
        self.paused = False
        self.step: TrainingHead | None = None
        self._hooks = contextlib.ExitStack()
        self._signature = inspect.signature(self.model.forward)

        # A function, not a bound method: deep copies of the model (an averaged copy, say) must not
        # copy this watch. They carry the hook along, though.
        def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if model is self.model and not self.paused:
                self._begin(args, kwargs)

        self._handle = self.model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)

    def close(self) -> None:
        """Leaves the model as it was."""
        self._handle.remove()
        self._hooks.close()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if self.step is not None and self.step.weights_S is not None:
            raise RuntimeError(
                "call collect() after every backward; the last micro-batch's norms were not"
                " collected"
            )
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {}), **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("labels") is None or given.get("input_ids") is None:
            raise ValueError(
                "recording while training reads input_ids and labels from the model's arguments;"
                " both must be passed"
            )
        batch = {k: given[k] for k in _OF_THE_LAYOUT if isinstance(given.get(k), Tensor)}
        batch = with_segments(batch)
        layout = read_layout(batch)
        if layout.has_holes:
            raise ValueError(
                "attention_mask has padding between a sample's tokens, whose neighbours the step's"
                " loss takes as targets of each other; remove it, or use score()"
            )
        named = tuple(sorted(given))
        kind = ("training", kind_of(self.model, layout), named, given.get("use_cache"))
        self.paused = True
        try:
            trial = tried_for_training(self.scorer, kind, batch, layout, given)
        finally:
            self.paused = False
        self._hooks.close()
        _, layout = as_the_loss_reads(batch, layout, trial)
        plan, layout = trial.plan, layout.behind(trial.front)
        measurement = Measurement(plan, layout, self.scorer.head.gather)
        measurement.references = self.references.gradients
        # frozen tables whose rows nothing below makes require grad are measured too
        device = layout.input_ids.device
        measurement.grad_root = torch.zeros((), device=device, requires_grad=True)
        matrix = is_plain_linear(getattr(plan.head, "base_layer", plan.head))
        self.step = TrainingHead(measurement, trial.transform, self.scorer.head, matrix)
        self._hooks.enter_context(attached(measurement, plan.body() if matrix else plan.sites))
        self._hooks.enter_context(measurement.hooked(plan.head, self._head_hook(self.step)))
        backbone = _backbone(self.model)
        if backbone is not None:
            self._hooks.enter_context(measurement.hooked(backbone, self._backbone_hook(self.step)))

    def _head_hook(self, step: TrainingHead) -> Callable[..., Any]:
        layout = step.measurement.layout

        def hook(module: nn.Module, args: Any, kwargs: Any, logits: Any) -> Any:
            if not isinstance(logits, Tensor) or logits.shape[:2] != (layout.rows, layout.length):
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise RuntimeError(
                    f"the head gave {found} for {layout.rows} x {layout.length} tokens; record"
                    " without logits_to_keep"
                )
            if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return None
            step.read_logits(logits)
            hidden = (*args, *kwargs.values())[0]
            return tap((logits,), (hidden,), lambda grads, saved: step.logits_sink(*saved, *grads))[
                0
            ]

        return hook

    def _backbone_hook(self, step: TrainingHead) -> Callable[..., Any]:
        layout = step.measurement.layout

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = (
                output[0]
                if isinstance(output, tuple)
                else getattr(output, "last_hidden_state", None)
            )
            if not isinstance(hidden, Tensor) or hidden.shape[:2] != (layout.rows, layout.length):
                return None
            mixed = torch.is_autocast_enabled(hidden.device.type)

            def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
                if not step.saw_logits and grads[0] is not None:
                    step.hidden_sink(saved[0], grads[0], mixed)

            tapped = tap((hidden,), (hidden,), sink)[0]
            if isinstance(output, tuple):
                return (tapped, *output[1:])
            output["last_hidden_state"] = tapped
            return output

        return hook

    def collect(self, own_weights: Callable[[Layout], Tensor]) -> GradNorms:
        """The last micro-batch's norms; see GradNormRecorder.collect."""
        step = self.step
        if step is None or step.weights_S is None or step.losses_S is None:
            raise RuntimeError(
                "no backward through the model's head was seen since the last collect()"
            )
        measurement, weights_S = step.measurement, step.weights_S
        unweighed = (weights_S == 0) & (measurement.layout.target_counts > 0)
        if bool(unweighed.any()):
            raise RuntimeError(
                f"the step's loss weighs {int(unweighed.sum())} samples that have targets by 0, so"
                " no gradient of their own comes back; leave them out of the batch, or use score()"
            )
        measurement.finish()
        left_out = measurement.left_out()
        if left_out:
            raise RuntimeError(
                f"no rule measures {', '.join(left_out[:5])} while training ({len(left_out)}"
                " parameters); record other layers, or use score(), which can"
            )
        own_S = own_weights(measurement.layout)
        factor_S = torch.where(weights_S != 0, own_S / torch.where(weights_S != 0, weights_S, 1), 0)
        norms = summarise(
            self.scorer.plan, measurement, step.losses_S * own_S, self.references, factor_S
        )
        self._hooks.close()
        self.step = None
        return norms


def _backbone(model: nn.Module) -> nn.Module | None:
    """The model without its head, by Hugging Face's name for it; its output's last hidden state is
    the head's input.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(inner, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not inner else None


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
