"""Tries a model before a training step of a new kind is recorded, and holds one sample against a
backward of its own. What a recorded step could not measure is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from grads_ds.gradnorm.batch_layout import Layout, read_layout
from grads_ds.gradnorm.measure.frozen import UnknownLogits
from grads_ds.gradnorm.measure.measurement import Measurement
from grads_ds.gradnorm.scoring.forward_backward import score_frozen
from grads_ds.gradnorm.scoring.micro_batch import Scorer
from grads_ds.gradnorm.trial.guard import Verdict, check_one_sample
from grads_ds.gradnorm.trial.label_shift import takes_labels_unshifted
from grads_ds.gradnorm.trial.try_model import Trial, try_model

# arguments of a forward that a trial of the model leaves out; "fused_lm_head": TRL's, under which a
# forward without labels fails
_OF_THE_OUTPUT = ("past_key_values", "return_dict")
_OF_THE_LOSS = ("labels", "fused_lm_head", "num_items_in_batch", *_OF_THE_OUTPUT)
_PADDING = (
    "pad on the right, pass position_ids that count from each sample's first token, or use"
    " score(), which does not depend on it"
)


def tried_for_training(
    scorer: Scorer,
    kind: Hashable,
    batch: Mapping[str, Tensor],
    layout: Layout,
    given: Mapping[str, Any],
) -> Trial:
    """What is known of steps of this kind; the model is tried if it is new.

    Raises ValueError where samples see each other or their padding, RuntimeError where a norm
    differs from the sample's own.

    Args:
        scorer: what is known of the model.
        kind: of the step.
        batch: input_ids, labels and what else the layout was read from.
        layout: of the batch.
        given: what the step calls the model with.
    """
    ranks = scorer.ranks(layout)
    if not ranks.largest(int(kind not in scorer.trials)):
        return scorer.trials[kind]
    inputs = {name: value for name, value in given.items() if name not in _OF_THE_LOSS}
    trial = try_model(scorer.model, scorer.plan, layout, inputs)
    if not trial.apart and layout.packed_index is not None:
        raise ValueError(
            "the samples of a packed row see each other in this model, so none has a gradient of"
            " its own; pass use_cache=False, train on padded rows, or score()"
        )
    if not trial.apart:
        raise ValueError(
            "the samples of a batch see each other in this model, so none has a gradient of its"
            " own; train on one sample at a time, or use score()"
        )
    with_labels = {name: value for name, value in given.items() if name not in _OF_THE_OUTPUT}
    unshifted = takes_labels_unshifted(scorer.model, scorer.plan.head, with_labels)
    trial = replace(trial, unshifted=bool(ranks.largest(int(unshifted))))
    batch, layout = as_the_loss_reads(batch, layout, trial)
    if scorer.checks:
        _refuse(_verdict(scorer, trial, batch, layout, inputs), layout)
    scorer.trials[kind] = trial
    return trial


def as_the_loss_reads(
    batch: Mapping[str, Tensor], layout: Layout, trial: Trial
) -> tuple[Mapping[str, Tensor], Layout]:
    """The batch and its layout with the targets that the step's own loss takes from the labels."""
    if not trial.unshifted:
        return batch, layout
    batch = {name: value for name, value in batch.items() if name != "labels"} | {
        "shift_labels": batch["labels"]
    }
    return batch, read_layout(batch)


def _verdict(
    scorer: Scorer,
    trial: Trial,
    batch: Mapping[str, Tensor],
    layout: Layout,
    inputs: Mapping[str, Any],
) -> Verdict:
    """Scores the step's own batch, called as the step calls the model, and compares a sample."""
    padded_left = _padded_left(layout)
    layout = layout.behind(trial.front)
    measurement = Measurement(trial.plan, layout, scorer.head.gather)
    weights_S = scorer.sample_weights(layout)
    transform = None if trial.own_head else trial.transform
    try:
        values = score_frozen(scorer.model, measurement, scorer.head, inputs, weights_S, transform)
    except UnknownLogits:
        measurement = Measurement(trial.plan, layout, scorer.head.gather)
        values = score_frozen(scorer.model, measurement, scorer.head, inputs, weights_S, None)
    loss_S = scorer.losses(layout, values)
    return check_one_sample(
        scorer.model, measurement, batch, loss_S, scorer.loss_reduction, padded_left
    )


def _padded_left(layout: Layout) -> bool:
    return layout.packed_index is None and not bool(layout.real[:, 0].all())


def _refuse(verdict: Verdict, layout: Layout) -> None:
    if verdict.loss is not None:
        raise ValueError(
            f"a sample's loss is {verdict.loss[0]:.6g} in this batch and {verdict.loss[1]:.6g} by"
            f" itself: the model's samples depend on their padding or on each other; {_PADDING}"
        )
    if verdict.names:
        name, (measured, own) = next(iter(verdict.names.items()))
        if _padded_left(layout):
            raise ValueError(
                f"the gradient norm of {name} is {measured:.6g} in this batch and {own:.6g} by"
                f" itself ({len(verdict.names)} parameters differ): the model's samples may depend"
                f" on their padding; {_PADDING}"
            )
        raise RuntimeError(
            f"the gradient norm of {name} came out as {measured:.6g}, by itself it is {own:.6g}"
            f" ({len(verdict.names)} parameters differ): no rule measures it while training; record"
            " other layers, or use score(), which can"
        )
