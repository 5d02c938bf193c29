"""Holds what was measured for one sample against one backward of its own: the guard against models
and layers that this package does not know.

Run on the first batch of every kind. Costs one forward and backward of one sample, in the model's
own precision. Reads gradients without accumulating them: `.grad` and whatever reduces gradients
over ranks see nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_kind import is_half
from grads_ds.gradnorm.batch_layout import IGNORE_INDEX, read_layout, unpad
from grads_ds.gradnorm.formulas.linear import accumulate
from grads_ds.gradnorm.measure.frozen import frozen, logits_of, model_inputs, recomputes_reentrantly
from grads_ds.gradnorm.measure.lookup import looked_up, requiring_grad
from grads_ds.gradnorm.measure.measurement import Measurement

# Largest relative difference of a parameter's norm and of the loss, and how much of its group's
# norm a parameter's may be off (a bias in front of a softmax has rounding errors for a gradient).
# Where a step is padded on the left, what the padding does is told from rounding as well as can be.
TOLERANCE = {"full": (1e-4, 2e-5), "half": (1e-1, 3e-2), "padded left": (1e-5, 1e-5)}
LARGEST = 2**28  # elements of the gradients that are held at once


@dataclass(frozen=True)
class Verdict:
    """loss: (measured, of the sample alone) where they differ. names: parameters whose norm does,
    with both values. checked: False where the batch has no target, so that nothing was compared.
    """

    loss: tuple[float, float] | None
    names: dict[str, tuple[float, float]]
    checked: bool


def check_one_sample(
    model: nn.Module,
    measurement: Measurement,
    batch: Mapping[str, Tensor],
    loss_S: Tensor,
    loss_reduction: str,
    padded_left: bool = False,
) -> Verdict:
    """Compares the shortest sample that has targets.

    Args:
        model: the model that was measured.
        measurement: its sums of this batch, finished.
        batch: input_ids, labels or shift_labels, and what else the layout was read from.
        loss_S: the samples' losses as measured.
        loss_reduction: "mean" or "sum" over the sample's targets.
        padded_left: the batch was measured with padding in front of its samples.
    """
    layout = measurement.layout
    counts = layout.target_counts.tolist()
    lengths = layout.token_counts.tolist()
    with_targets = [sample for sample, count in enumerate(counts) if count]
    sample = min(with_targets, key=lambda s: lengths[s]) if with_targets else 0
    left_out = set(measurement.left_out())
    names = _affordable(model, [n for n in measurement.plan.groups if n not in left_out])
    ids, targets = unpad(batch)[sample]
    if "shift_labels" not in batch:
        targets = nn.functional.pad(targets[1:], (0, 1), value=IGNORE_INDEX)
    own = _own_backward(model, measurement.plan.embedding, names, ids, targets)
    loss, squares = own.loss, own.squares
    if not with_targets:
        return Verdict(None, {}, False)
    if loss_reduction == "mean":
        loss, scale = loss / counts[sample], 1 / counts[sample]
    else:
        scale = 1.0
    half = own.autocast or is_half(model, layout)
    relative, of_group = TOLERANCE["half" if half else "padded left" if padded_left else "full"]
    measured_loss = float(loss_S[sample])
    differs = abs(measured_loss - loss) > relative * (abs(loss) + 1e-3)
    found = {n: float(measurement.sums[n][sample]) for n in names if n in measurement.sums}
    sizes: dict[str, float] = {}
    for name, square in squares.items():
        group = measurement.plan.groups[name]
        sizes[group] = sizes.get(group, 0.0) + square * scale**2
    wrong = {}
    for name, square in squares.items():
        alone, measured = square**0.5 * scale, max(0.0, found.get(name, 0.0)) ** 0.5
        floor = of_group * sizes[measurement.plan.groups[name]] ** 0.5
        if not abs(alone - measured) <= relative * alone + floor:
            wrong[name] = (measured, alone)
    return Verdict((measured_loss, loss) if differs else None, wrong, True)


def _affordable(model: nn.Module, names: Sequence[str]) -> list[str]:
    """As many parameters as may be held at once: of each kind (module class, its name in it, shape)
    the first, then the rest in order.
    """
    parameters = dict(model.named_parameters())
    seen: set[tuple[object, ...]] = set()
    first: list[str] = []
    rest: list[str] = []
    for name in names:
        path, _, local = name.rpartition(".")
        leaf = path.rsplit(".", 1)[-1]
        kind = (type(model.get_submodule(path)), leaf, local, _numel(parameters[name]))
        (rest if kind in seen else first).append(name)
        seen.add(kind)
    taken, total = [], 0
    for name in first + rest:
        if total + _numel(parameters[name]) <= LARGEST:
            taken.append(name)
            total += _numel(parameters[name])
    return taken


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@dataclass(frozen=True)
class _Own:
    """A sample by itself: its summed loss, the squared norm of its gradient for each name, and
    whether the model ran under autocast.
    """

    loss: float
    squares: dict[str, float]
    autocast: bool


def _own_backward(
    model: nn.Module, embedding: nn.Module, names: Sequence[str], ids: Tensor, targets: Tensor
) -> _Own:
    """targets: what each position is to predict, IGNORE_INDEX where nothing."""
    parameters = [model.get_parameter(name) for name in names]
    layout = read_layout({"input_ids": ids[None], "labels": ids[None]})
    root = torch.zeros((), device=ids.device, requires_grad=True)
    with (
        frozen(model, checkpointing=not recomputes_reentrantly(model)),
        looked_up(embedding, requiring_grad(root)),
        torch.enable_grad(),
    ):
        for parameter in parameters:
            parameter.requires_grad_(True)
        # a trainer may wrap the model's forward in autocast, which is seen only inside of it
        inside: list[bool] = []
        handle = embedding.register_forward_pre_hook(
            lambda *_: inside.append(torch.is_autocast_enabled(ids.device.type))
        )
        try:
            logits = logits_of(model(**model_inputs(model, layout)))
            assert logits is not None
            keep = targets != IGNORE_INDEX
            loss = nn.functional.cross_entropy(
                accumulate(logits[0, -len(ids) :][keep]), targets[keep], reduction="sum"
            )
            seeded = loss + 0 * logits.sum()
            grads = torch.autograd.grad(seeded, [root, *parameters], allow_unused=True)[1:]
        finally:
            handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)
    squares = {
        name: 0.0 if grad is None else float(accumulate(grad).square().sum(dtype=torch.float64))
        for name, grad in zip(names, grads, strict=True)
    }
    return _Own(float(loss.detach()), squares, any(inside))


def warn_one_by_one(verdict: Verdict) -> None:
    """Says what is measured the slow way from now on."""
    first, (measured, own) = next(iter(verdict.names.items()))
    warnings.warn(
        f"gradient norms: {len(verdict.names)} parameters differ from a backward of their own"
        f" ({first}: {measured:.6g}, by itself {own:.6g}); from now on they are measured one sample"
        " at a time",
        stacklevel=2,
    )


def warn_row_by_row(verdict: Verdict) -> None:
    """Says why batches are taken apart from now on."""
    assert verdict.loss is not None
    measured, own = verdict.loss
    warnings.warn(
        f"gradient norms: a sample's loss is {measured:.6g} in this batch and {own:.6g} by itself:"
        " this model's samples depend on their padding or on each other; from now on they are"
        " scored one row at a time",
        stacklevel=2,
    )


def refuse_loss(verdict: Verdict) -> None:
    """A sample that has another loss when it is alone a second time has none that is its own."""
    assert verdict.loss is not None
    measured, own = verdict.loss
    raise ValueError(
        f"a sample scored alone has the loss {measured:.6g}, and {own:.6g} when it is scored again:"
        " the model draws at random or keeps a state; switch that off to record it"
    )
