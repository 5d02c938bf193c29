"""Whole models on the way through a training: what it would have been to stop earlier.

Writes a Hugging Face folder at each asked step; evaluation reads them as models of their own. They
are no checkpoints to resume from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from grads_ds.config.config import Config
from grads_ds.distributed import heartbeat, ranks
from grads_ds.engine.model_folder import save_model


class Snapshots(TrainerCallback):
    """Writes the model after the steps of `folders` (step -> folder). Every rank calls it.

    A training that begins anew removes what an earlier one left; one that is resumed keeps it, for
    it has the same inputs.
    """

    def __init__(self, config: Config, folders: Mapping[int, Path]):
        self.config, self.folders = config, folders

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Removes snapshots of an earlier training."""
        if state.global_step == 0 and ranks.is_main():
            for folder in self.folders.values():
                shutil.rmtree(folder, ignore_errors=True)

    def on_step_end(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Writes the snapshot of this step, if one is asked for."""
        folder = self.folders.get(state.global_step)
        if folder is None:
            return
        heartbeat.beat(f"snapshot of step {state.global_step}")
        while hasattr(model, "module"):  # what DeepSpeed made of it
            model = model.module
        save_model(model, self.config, folder)


def snapshot_steps(shares: Mapping[float, Path], steps: int) -> dict[int, Path]:
    """Step -> folder; a share's step is at least the first and before the last. Shares that fall on
    one step give one snapshot, the first one's.
    """
    found: dict[int, Path] = {}
    for share, folder in shares.items():
        step = max(1, round(share * steps))
        if step < steps:
            found.setdefault(step, folder)
    return found
