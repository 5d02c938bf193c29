"""Activations computed again in the backward instead of kept: `probe.gradient_checkpointing` while
recording.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from grads_ds.config.errors import UserError, problem


def recompute_activations(model: Any, layers: int | None) -> None:
    """Let the first `layers` layers (None: all) compute their activations again in the backward.

    Leaves the model in training mode, in which alone transformers does so; the recorder switches
    dropout off. The last layers are those to leave out: their activations are gone before the
    others' are there again. Raises UserError for a model that cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        wanted, name = "a model that computes activations again", type(model).__name__
        raise UserError(
            problem("probe.gradient_checkpointing", wanted, f"{name}, which does not", "set false")
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    if layers is None:
        return
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if len(blocks) < layers:
        found = f"{len(blocks)} of them in {type(model).__name__}"
        raise UserError(
            problem("probe.recompute_layers", f"{layers} layers", found, "set null for all")
        )
    for block in blocks[layers:]:
        block.gradient_checkpointing = False
