"""Resumable checkpoints of a training: which are whole, which is the newest, how many are kept.

Reads and writes the trainer's `checkpoint-<step>` folders. A folder counts once every rank has written its part and rank 0 has then
put the mark in it; a folder without the mark was not finished, is never resumed from, and is removed at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from grads_ds import ranks

COMPLETE = "complete"  # the mark: JSON of what wrote the checkpoint


class Checkpoints(TrainerCallback):
    """Marks finished checkpoints and keeps the last `kept` of them, besides the best where the trainer wants it back."""

    def __init__(self, kept: int):
        self.kept = kept

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Skips the checkpoint of the last step, which the model itself follows, unless the best one is asked for at the end."""
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Rank 0 marks the checkpoint when all ranks have come, and only then removes older ones."""
        ranks.barrier()
        if not ranks.is_main():
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        with open(folder / COMPLETE, "w") as file:
            json.dump({"ranks": ranks.world(), "step": state.global_step}, file)
            file.flush()
            os.fsync(file.fileno())
        best = state.best_model_checkpoint
        for old in finished(folder.parent)[: -self.kept]:
            if best is None or old != Path(best):
                shutil.rmtree(old)


def finished(work_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted((mark.parent for mark in work_dir.glob(f"checkpoint-*/{COMPLETE}")), key=_step)


def last_checkpoint(work_dir: Path) -> str | None:
    """The newest finished checkpoint; unfinished ones are removed. Every rank calls this."""

    def find() -> str | None:
        for folder in work_dir.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                print(f"{folder.name} was not finished and is removed", flush=True)
                shutil.rmtree(folder)
        whole = finished(work_dir)
        return str(whole[-1]) if whole else None

    return ranks.from_main(find)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
