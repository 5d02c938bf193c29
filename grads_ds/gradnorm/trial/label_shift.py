"""Which label a model's own loss holds each position against: the next position's, as most causal
language models do, or the position's own, as decoders of encoder-decoder families do (BART,
Whisper; XLM too), whose users move the labels themselves.

Tried once for each model, with a forward and the backward of the loss alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm.batch_layout import IGNORE_INDEX
from grads_ds.gradnorm.measure.frozen import frozen


def takes_labels_unshifted(model: nn.Module, head: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether position t of the model's own loss has the target labels[t], and not labels[t + 1].

    given: what the model is called with; labels, int64 [B, T], among it. Logits of zero are put in
    the place of the head's, so that a target is the smallest entry of its row's gradient. False as
    well where that cannot be told: no loss of the model's own, no logits, no targets.
    """
    levelled: list[Tensor] = []

    def level(module: nn.Module, args: Any, output: Any) -> Tensor:
        levelled.append(torch.zeros_like(output).requires_grad_())
        return levelled[-1]

    with frozen(model, checkpointing=False), torch.enable_grad():
        # behind other hooks: DeepSpeed's would wait for a backward of the head that never comes
        handle = head.register_forward_hook(level)
        try:
            loss = getattr(model(**given), "loss", None)
        finally:
            handle.remove()
        if not isinstance(loss, Tensor) or not loss.requires_grad or not levelled:
            return False
        (grads_BTV,) = torch.autograd.grad(loss, [levelled[-1]])
    labels_BT = given["labels"]
    grads_BTV = grads_BTV[:, -labels_BT.shape[1] :]  # without positions that the model adds
    if grads_BTV.shape[:2] != labels_BT.shape or not bool(grads_BTV.any()):
        return False
    next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    return _has_targets(grads_BTV, labels_BT) and not _has_targets(grads_BTV, next_BT)


def _has_targets(grads_BTV: Tensor, targets_BT: Tensor) -> bool:
    """Whether these are the positions that have a gradient, and its smallest entries."""
    here_BT = targets_BT != IGNORE_INDEX
    reached_BT = grads_BTV.abs().amax(-1) > 0
    found_N = grads_BTV[here_BT].argmin(-1)
    return torch.equal(reached_BT, here_BT) and torch.equal(found_N, targets_BT[here_BT])
