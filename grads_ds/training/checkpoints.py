"""Resumable checkpoints of a training: which are whole, which is the newest, how many are kept.

Reads and writes the trainer's `checkpoint-<step>` folders. A folder counts once every rank has
written its part and rank 0 has then put the mark in it; a folder without the mark was not finished,
is never resumed from, and is removed at the next start. A checkpoint of another number of ranks is
first rewritten as a universal one, beside the ranks' parts, and compared with them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from grads_ds.distributed import heartbeat, ranks
from grads_ds.launcher.runners import TORCH_VARIABLES
from grads_ds.training.universal_checkpoint import VERIFIED

COMPLETE = "complete"  # the mark: JSON of what wrote the checkpoint


class Checkpoints(TrainerCallback):
    """Marks finished checkpoints and keeps the last `kept` of them, besides the best where the
    trainer wants it back.
    """

    def __init__(self, kept: int):
        self.kept = kept

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Gives each parameter a step counter of its own.

        After a universal ZeRO-3 checkpoint all hold one tensor (seen with DeepSpeed 0.19.8), which
        torch's AdamW counts up in place, once for each group of parameters: the bias correction,
        and so the training, would drift.
        """
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        for values in optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Skips the checkpoint of the last step, which the model itself follows, unless the best
        one is asked for at the end.
        """
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Rank 0 marks the checkpoint once all ranks are there, and then removes older ones."""
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


def needs_universal(checkpoint: str | Path) -> bool:
    """Whether other ranks wrote the checkpoint than run now, and each wrote a part of the
    optimizer.
    """
    folder = Path(checkpoint)
    wrote = json.loads((folder / COMPLETE).read_text())["ranks"]
    return bool(wrote != ranks.world() and any(folder.glob("global_step*/*optim_states.pt")))


def make_universal(checkpoint: str | Path) -> None:
    """Rewrite the checkpoint so that any number of ranks can load it, unless that was done already.
    Every rank calls this.

    Rank 0 has it converted and compared in a process of its own, which takes memory and worker
    processes (grads_ds/training/universal_checkpoint.py). That may last longer than a collective or
    a rank without progress is given: meanwhile all ranks look for the mark and say that they live.
    """
    folder = Path(checkpoint)
    source = next(folder.glob("global_step*"))
    target = folder / f"universal_{source.name}"
    doing = (
        f"{folder.name}: rewriting it for {ranks.world()} rank{'s' if ranks.world() > 1 else ''}"
    )
    process = None
    if ranks.is_main() and not (target / VERIFIED).exists():
        shutil.rmtree(target, ignore_errors=True)
        print(doing, flush=True)
        alone = {name: value for name, value in os.environ.items() if name not in TORCH_VARIABLES}
        command = [
            sys.executable,
            "-m",
            "grads_ds.training.universal_checkpoint",
            str(source),
            str(target),
        ]
        with open(folder / "universal.log", "w") as log:
            process = subprocess.Popen(command, env=alone, stdout=log, stderr=log)
    while not (target / VERIFIED).exists():
        heartbeat.beat(doing)
        if process is not None and process.poll():
            last = "\n".join((folder / "universal.log").read_text().splitlines()[-20:])
            raise RuntimeError(
                f"{folder} could not be rewritten for {ranks.world()} ranks:\n{last}"
            )
        time.sleep(0.2)
    if process is not None:
        process.wait()
    ranks.barrier()


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
