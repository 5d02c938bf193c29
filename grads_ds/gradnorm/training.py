"""Recording while a model trains: the same taps, on the forward and backward of the user's own step.

The loss of the step weighs its tokens as it likes (mean over the batch, over several micro-batches, scaled for fp16). What each
sample was weighed by is read off the gradient of its logits, which for cross-entropy is weight * (softmax - onehot), and divided out,
so that the norms are those of the sample's own loss. A loss of another form is refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.frozen import keeps_packed_apart
from grads_ds.gradnorm.head import LogitTransform
from grads_ds.gradnorm.layout import Layout, read_layout
from grads_ds.gradnorm.linear import accumulate, bias_norm_squared, weight_norm_squared
from grads_ds.gradnorm.results import GradNorms, References, summarise
from grads_ds.gradnorm.rules import Plan, head_name
from grads_ds.gradnorm.sites import Gather, Measurement
from grads_ds.gradnorm.tap import tap

_CHUNK = 2**24
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the check that the loss is what it must be; else 0.1


class Watch:
    """Watches a model's training forwards and backwards until closed."""

    def __init__(
        self, model: nn.Module, plan: Plan, transform: LogitTransform, gather: Gather | None, references: References
    ) -> None:
        self.model, self.plan, self.transform, self.gather, self.references = model, plan, transform, gather, references
        self.paused = False
        self._packs: bool | None = None
        self.measurement: Measurement | None = None
        self.losses_N: Tensor | None = None
        self.weights_S: Tensor | None = None
        self._probes: tuple[Tensor, Tensor] | None = None
        self._hooks = contextlib.ExitStack()
        self._signature = inspect.signature(model.forward)
        # A function, not a bound method: deep copies of the model (an averaged copy, say) must not copy this watch.
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
            raise RuntimeError("call collect() after every backward; the last micro-batch's norms were not collected")
        batch = self._signature.bind_partial(*args, **kwargs).arguments
        batch = {**batch, **batch.pop("kwargs", {}), **kwargs}
        if batch.get("labels") is None or batch.get("input_ids") is None:
            raise ValueError(
                "recording while training reads input_ids and labels from the model's arguments; both must be passed"
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
                inputs = {name: value for name, value in kwargs.items() if name != "labels"}
                self._packs = not args and keeps_packed_apart(self.model, self.plan.head, layout, inputs)
            finally:
                self.paused = False
        if layout.num_samples > layout.rows and not self._packs:
            raise ValueError(
                "the samples of a packed row see each other in this model, so none has a gradient of its own; pass "
                "use_cache=False, train on padded rows, or score()"
            )
        self._hooks.close()
        measurement = self.measurement = Measurement(self.plan, layout, self.gather)
        measurement.references = self.references.gradients
        if not self.plan.embedding.weight.requires_grad:
            measurement.anchor = torch.zeros((), device=layout.input_ids.device, requires_grad=True)
        self.losses_N = self._probes = None
        sites = [site for site in self.plan.sites if site.module is not self.plan.head]
        self._hooks.enter_context(measurement.attached(sites))
        handle = self.plan.head.register_forward_hook(self._head_hook, prepend=True)
        self._hooks.callback(handle.remove)

    def _head_hook(self, module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        measurement = self.measurement
        assert measurement is not None
        layout = measurement.layout
        if logits.shape[:2] != (layout.rows, layout.length):
            raise RuntimeError(
                f"the head gave {tuple(logits.shape)} for {layout.rows} x {layout.length} tokens; record without "
                "logits_to_keep"
            )
        with torch.no_grad():
            self.losses_N = self._token_losses(logits.detach(), layout)
            self._probes = self._expected_rows(logits.detach(), layout, self.losses_N)

        def sink(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
            self._head_sink(saved[0], grads[0])

        return tap((logits,), (args[0],), sink)[0]

    def _token_losses(self, logits: Tensor, layout: Layout) -> Tensor:
        """The cross-entropy of each target, a chunk of rows at a time."""
        flat = logits.reshape(-1, logits.shape[-1])
        step = max(1, _CHUNK // flat.shape[1])
        losses = []
        for positions, targets in zip(layout.target_positions.split(step), layout.target_ids.split(step), strict=True):
            rows = self.transform.apply(accumulate(flat[positions]))  # a copy: the transform may write into it
            losses.append(rows.logsumexp(-1) - rows.gather(1, targets[:, None])[:, 0])
        return torch.cat(losses) if losses else flat.new_zeros(0)

    def _expected_rows(self, logits: Tensor, layout: Layout, losses_N: Tensor) -> tuple[Tensor, Tensor]:
        """For each sample with targets its first target and the one with the largest loss: which they are (index into N), and
        softmax - onehot there, through the logits' transform."""
        chosen = []
        for start, stop in layout.split_targets():
            if stop > start:
                chosen += [start + int(losses_N[start:stop].argmax()), start]
        index_P = torch.tensor(chosen, dtype=torch.long, device=logits.device)
        rows = accumulate(logits.reshape(-1, logits.shape[-1])[layout.target_positions[index_P]]).double()
        transformed = self.transform.apply(rows)
        expected = transformed.softmax(-1)
        expected[torch.arange(len(index_P), device=expected.device), layout.target_ids[index_P]] -= 1
        return index_P, self.transform.backward(expected, transformed)

    def _head_sink(self, hidden: Tensor, grads: Tensor) -> None:
        measurement, layout = self.measurement, self.measurement.layout  # type: ignore[union-attr]
        assert measurement is not None and self._probes is not None
        grads_RV, hidden_RD = grads.reshape(-1, grads.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        self.weights_S = self._weights(grads_RV, layout, *self._probes)
        name, bias = (head_name(self.model, self.plan, local) for local in ("weight", "bias"))
        zero = torch.zeros(layout.num_samples, dtype=torch.float64, device=grads.device)
        weight_S, bias_S, inner_S = zero.clone(), zero.clone(), zero.clone()
        ids_SL = layout.per_sample(layout.input_ids)
        assert ids_SL is not None
        if self.plan.tied and name:
            measurement.head_rows = accumulate(hidden_RD).new_zeros(*ids_SL.shape, hidden_RD.shape[1])
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
                    measurement.head_rows[sample] = accumulate(g_1tV[0][:, ids_SL[sample]]).T @ accumulate(h_1tD[0])
            if bias:
                bias_S[sample] = bias_norm_squared(g_1tV)[0]
                if bias in measurement.references:
                    inner_S[sample] += (accumulate(g_1tV[0]) @ measurement.references[bias]).sum(dtype=torch.float64)
        if name:
            measurement.add(name, weight_S)
            if name in measurement.references:
                measurement.add_inner(name, inner_S)
        if bias:
            measurement.add(bias, bias_S)

    def _weights(self, grads_RV: Tensor, layout: Layout, index_P: Tensor, expected_PV: Tensor) -> Tensor:
        """What the step's loss weighed each sample's tokens by: least squares of the gradient on softmax - onehot."""
        tolerance = _TOLERANCE.get(grads_RV.dtype, 0.1)
        sizes_R = torch.linalg.vector_norm(grads_RV, dim=-1, dtype=torch.float32).square()
        stray = sizes_R.index_fill(0, layout.target_positions, 0).sum()
        found_PV = grads_RV[layout.target_positions[index_P]].double()
        weight_P = (found_PV * expected_PV).sum(-1) / expected_PV.square().sum(-1).clamp_min(1e-60)
        off_P = (found_PV - weight_P[:, None] * expected_PV).norm(dim=-1)
        wrong = bool((off_P > tolerance * found_PV.norm(dim=-1) + 1e-6 * weight_P.abs()).any())
        first, second = weight_P[0::2], weight_P[1::2]
        clear = expected_PV[1::2].norm(dim=-1) > 1e-3  # a token predicted with certainty tells nothing
        wrong |= bool(((first - second).abs() > tolerance * first.abs())[clear].any())
        if wrong or bool(stray > tolerance**2 * sizes_R.sum()):
            raise RuntimeError(
                "the loss of this step is not a cross-entropy of the labels with one weight per sample (label smoothing, "
                "a z-loss, per-token weights, or other labels than the model was given): per-sample norms of it cannot "
                "be told; use score() instead"
            )
        weights_S = torch.zeros(layout.num_samples, dtype=torch.float64, device=grads_RV.device)
        weights_S[layout.target_samples[index_P]] = weight_P[0::2].repeat_interleave(2)
        return weights_S

    def collect(self, own_weights: Callable[[Layout], Tensor]) -> GradNorms:
        """The last micro-batch's norms; see GradNormRecorder.collect."""
        measurement = self.measurement
        if measurement is None or self.weights_S is None or self.losses_N is None:
            raise RuntimeError("no backward through the model's head was seen since the last collect()")
        left_out = [name for name in measurement.left_out() if name not in _names(self.model, self.plan.head)]
        if left_out:
            raise RuntimeError(
                f"no rule measures {', '.join(left_out[:5])} while training ({len(left_out)} parameters); record other "
                "layers, or use score(), which can"
            )
        layout = measurement.layout
        own_S = own_weights(layout)
        factor_S = torch.where(self.weights_S != 0, own_S / torch.where(self.weights_S != 0, self.weights_S, 1), 0)
        loss_S = torch.zeros_like(own_S).index_add_(0, layout.target_samples, self.losses_N.double()) * own_S
        norms = summarise(self.plan, measurement, loss_S, self.references, factor_S)
        self._hooks.close()
        self.measurement = self.weights_S = self.losses_N = self._probes = None
        return norms


def _names(model: nn.Module, module: nn.Module) -> set[str]:
    own = {id(p) for p in module.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in own}


def with_segments(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed rows given by restarting position_ids and no mask, as Hugging Face's collators give them: adds their segment_ids."""
    positions = batch.get("position_ids")
    if positions is None or "segment_ids" in batch or batch.get("attention_mask") is not None:
        return dict(batch)
    restarts = torch.zeros_like(positions)
    restarts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).long()
    return {**batch, "segment_ids": restarts.cumsum(-1)} if bool(restarts.any()) else dict(batch)
