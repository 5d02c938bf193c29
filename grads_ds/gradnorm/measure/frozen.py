"""Frozen scoring: a forward, the head at the target positions, and a backward of activations only.

No parameter needs a gradient, nothing is reduced over ranks, no optimizer exists: under ZeRO-3 the
only traffic is the gathering of parameters. The model's own forward runs with its head swapped out,
so that whatever the model does in front of the head is kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform
from grads_ds.gradnorm.measure.module_state import state_left_alone


@contextlib.contextmanager
def frozen(model: nn.Module, checkpointing: bool = True) -> Iterator[None]:
    """No parameter requires grad, no dropout, and what modules keep from call to call is as before
    afterwards; activation checkpointing, which only works in training mode, stays as it was unless
    it is switched off here.
    """
    required = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        for module, training in modes:
            kept = checkpointing and bool(getattr(module, "gradient_checkpointing", False))
            module.training = training and kept
            # such a module may apply dropout itself, or leave out layers at random
            if module.training:
                found = [
                    (name, rate)
                    for name, rate in vars(module).items()
                    if "drop" in name and isinstance(rate, float)
                ]
                for name, rate in found:
                    rates.append((module, name, rate))
                    setattr(module, name, 0.0)
        with state_left_alone(model):
            yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, training in modes:
            module.training = training
        for parameter in required:
            parameter.requires_grad_(True)


def recomputes_reentrantly(model: nn.Module) -> bool:
    """Whether activation checkpointing of any module is the reentrant kind, under which the
    gradients of single parameters cannot be asked for.
    """
    return any(
        getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get(
            "use_reentrant", True
        )
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    )


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward knows an argument of that name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(inner.forward).parameters


def model_inputs(model: nn.Module, layout: Layout, masked: bool = True) -> dict[str, Any]:
    """What the model's forward is called with: ids, and mask (unless not `masked`) and use_cache
    where it knows them; positions where its own would not do, for it may count them its own way
    (RoBERTa from padding_idx + 1).
    """
    inputs: dict[str, Any] = {"input_ids": layout.input_ids}
    if masked and layout.packed_index is None:
        inputs["attention_mask"] = layout.real.long()
    if takes(model, "position_ids") and layout.needs_positions:
        inputs["position_ids"] = layout.position_ids
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def keeps_packed_apart(
    model: nn.Module, head: nn.Module, layout: Layout, inputs: Mapping[str, Any] | None = None
) -> bool:
    """Whether the samples of a packed row do not see each other: tried by changing every row's
    first sample.

    Two forwards without gradients or logits, called with `inputs` (default: those of scoring).
    Models that take no position_ids, or read them without masking by them, fail; so does a call
    with a cache (transformers 5 then masks nothing by position).
    """
    if not takes(model, "position_ids"):
        return False
    index = layout.packed_index
    assert index is not None
    # flat position of each row's first token
    first = layout.length * torch.arange(layout.rows, device=index.device)
    touched = index[torch.isin(index[:, 0], first)]
    changed = layout.input_ids.reshape(-1).clone()
    places = touched[touched >= 0]
    changed[places] = (changed[places] + 1) % changed.max().clamp_min(1)
    others = index[~torch.isin(index[:, 0], first)]
    others = others[others >= 0]
    kept: list[Tensor] = []

    def take(hidden: Tensor) -> Tensor:
        kept.append(hidden.reshape(-1, hidden.shape[-1])[others].float())
        return stand_in_logits(hidden)

    with frozen(model), head_replaced(head, take), torch.no_grad():
        for ids in (layout.input_ids, changed.reshape(layout.rows, layout.length)):
            model(
                **{**(model_inputs(model, layout) if inputs is None else inputs), "input_ids": ids}
            )
    return torch.allclose(kept[0], kept[1], 1e-3, 1e-3)


@contextlib.contextmanager
def head_replaced(head: nn.Module, take: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While active the head's forward is `take(hidden)`: hooks around it (DeepSpeed's gathering)
    still run.

    `hidden` is the tensor as it was before those hooks: the backward starts there, and DeepSpeed's
    bookkeeping of the head's own backward, which never comes, must not be entered
    ("active_backward_submodules is empty", DeepSpeed 0.19.8).
    """
    had_own, original = "forward" in head.__dict__, head.forward
    given: list[Tensor] = []
    handle = head.register_forward_pre_hook(
        lambda module, args: given.append(args[0]), prepend=True
    )

    head.forward = lambda *args: take(given.pop())  # type: ignore[method-assign]
    try:
        yield
    finally:
        handle.remove()
        if had_own:
            head.forward = original  # type: ignore[method-assign]
        else:
            del head.forward


def config_transform(model: nn.Module) -> LogitTransform:
    """What the model's config says it does to its logits (Gemma's soft cap, Granite's and Cohere's
    scales).
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factor = getattr(config, "logit_scale", None) or 1.0
    names = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
    cap = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    return LogitTransform(float(factor) / float(divisor), cap)


def stand_in_logits(hidden: Tensor, values: int = 4) -> Tensor:
    """A few known numbers per position in the place of the logits: what the model makes of them
    shows what it does to logits.
    """
    ramp = torch.linspace(-40, 40, values, device=hidden.device, dtype=torch.float32).to(
        hidden.dtype
    )
    return ramp.expand(*hidden.shape[:-1], values).clone()


class UnknownLogits(ValueError):
    """The model changes its logits after the head in a way that is not known here."""


def check_transform(transform: LogitTransform, given: Tensor, seen: Any) -> None:
    """Raises UnknownLogits if the model did something else to its logits than `transform`.

    given: what the head gave; seen: the model's output.
    """
    if not _explains(transform, given, logits_of(seen)):
        raise UnknownLogits(
            f"expected scale {transform.scale} and soft cap {transform.cap}, as at first"
        )


def fitting_transform(
    known: LogitTransform, given: Tensor, logits: Tensor | None
) -> LogitTransform | None:
    """What made `logits` of `given`: what the config says, a part of it, or nothing; None if it is
    none of these.
    """
    candidates = [
        known,
        LogitTransform(),
        LogitTransform(known.scale),
        LogitTransform(1.0, known.cap),
        LogitTransform(1 / known.scale, known.cap),
    ]
    return next((c for c in candidates if _explains(c, given, logits)), None)


def _explains(transform: LogitTransform, given: Tensor, logits: Tensor | None) -> bool:
    if logits is None or logits.shape != given.shape:
        return False
    halves = (torch.float16, torch.bfloat16)
    half = (
        given.dtype in halves
        or logits.dtype in halves
        or torch.is_autocast_enabled(given.device.type)
    )
    relative, absolute = (2e-2, 1e-3) if half else (1e-5, 1e-5)
    expected = transform.apply(given.float().clone())
    return torch.allclose(logits.float(), expected, relative, absolute)


def logits_of(output: Any) -> Tensor | None:
    """The logits of a model's output, as an attribute, under a key, or the first of a tuple."""
    if isinstance(output, Mapping):
        return output.get("logits")
    if isinstance(output, tuple):
        return output[0]
    return getattr(output, "logits", None)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether the head is one matrix (and a bias), whose pass can be made by formula."""
    return type(head).forward is nn.Linear.forward
