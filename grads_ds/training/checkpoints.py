"""Resumable checkpoints of a training: which are whole, which is the newest, how many are kept.

Reads and writes the trainer's `checkpoint-<step>` folders. A folder counts once every rank has
written and synced its part and rank 0 has then put the mark in it: who wrote it, for which inputs,
and every file's size and sha256. A folder without the mark was not finished, is never resumed from,
and is removed at the next start; one that is not as its mark says is set aside, and the one before
it is taken.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from grads_ds.distributed import heartbeat, ranks
from grads_ds.run_dir.digests import sha256_once
from grads_ds.run_dir.publish import sync
from grads_ds.training.checkpoint_mark import COMPLETE, altered_files, read_mark, write_mark

_WRITER = re.compile(r"(?:pp_rank|rng_state)_(\d+)")  # in a file's name: the rank that wrote it


class Checkpoints(TrainerCallback):
    """Marks finished checkpoints and keeps the last `kept` of them, besides the best where the
    trainer wants it back. `identity`: the digest of what the training depends on.
    """

    def __init__(self, kept: int, identity: str):
        self.kept, self.identity = kept, identity

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Gives each parameter a step counter of its own."""
        own_step_counters(optimizer)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Skips the checkpoint of the last step, which the model itself follows, unless the best
        one is asked for at the end.
        """
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            control.should_save = False

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Every rank syncs its parts; rank 0 marks the checkpoint, and then removes older ones."""
        ranks.barrier()
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        files = _sync_and_digest(folder)
        if not ranks.is_main():
            return
        sync(folder)
        sync(folder.parent)
        mark = {
            "ranks": ranks.world(),
            "step": state.global_step,
            "identity": self.identity,
            "files": files,
        }
        write_mark(folder, mark)
        best = state.best_model_checkpoint
        for old in finished(folder.parent)[: -self.kept]:
            if best is None or old != Path(best):
                shutil.rmtree(old)


def finished(work_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted((mark.parent for mark in work_dir.glob(f"checkpoint-*/{COMPLETE}")), key=_step)


def set_strangers_aside(work_dir: Path, identity: str) -> None:
    """Rename `work_dir` when its checkpoints are of a training with other inputs, and say so; they
    are never gone on from. Called on rank 0.
    """
    marks = [mark for folder in finished(work_dir) if (mark := read_mark(folder))]
    other = next((mark["identity"] for mark in marks if mark["identity"] != identity), None)
    if other is None:
        return
    number, target = 1, work_dir.with_name(f"{work_dir.name}.{other[:8]}")
    while target.exists():
        number += 1
        target = work_dir.with_name(f"{work_dir.name}.{other[:8]}-{number}")
    work_dir.rename(target)
    print(
        f"{work_dir}: {len(marks)} checkpoint{'s' if len(marks) > 1 else ''} of a training with"
        f" other inputs: set aside as {target.name}, this training begins anew; remove that folder"
        " when it is not wanted",
        flush=True,
    )


def last_checkpoint(work_dir: Path, identity: str) -> str | None:
    """The newest whole checkpoint of a training with the inputs `identity`, or None.

    Unfinished ones are removed; damaged ones, and those of other inputs, are set aside with a
    sentence. Every rank calls this, and reads its share of the files.
    """

    def find() -> list[str]:
        for folder in work_dir.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                print(f"{folder.name} was not finished and is removed", flush=True)
                shutil.rmtree(folder)
        set_strangers_aside(work_dir, identity)
        return [str(folder) for folder in reversed(finished(work_dir))]

    for name in ranks.from_main(find):
        wrong = _damage(Path(name))
        if not wrong:
            return name
        ranks.from_main(lambda name=name, wrong=wrong: _set_aside(Path(name), wrong))  # type: ignore[misc]
    return None


def own_step_counters(optimizer: Any) -> None:
    """Give each parameter of an optimizer a step counter of its own.

    After a universal ZeRO-3 checkpoint all hold one tensor (grads_ds/workarounds.py), which torch's
    AdamW counts up in place, once for each group of parameters: the bias correction, and so the
    training, would drift.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for values in optimizer.state.values():
        if isinstance(values.get("step"), torch.Tensor):
            values["step"] = values["step"].clone()


def _sync_and_digest(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush this rank's files of a checkpoint to disk and read them; everybody's sizes and digests,
    by relative name. Every rank calls this once all have written.
    """
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    own = {}
    for name in sorted(names):
        writer = _WRITER.search(name)
        if (int(writer[1]) % ranks.world() if writer else 0) != ranks.rank():
            continue
        heartbeat.beat(f"{folder.name}: syncing it")
        sync(folder / name)
        sync((folder / name).parent)
        own[name] = {"size": (folder / name).stat().st_size, "sha256": sha256_once(folder / name)}
    return {name: file for part in ranks.all_gather_object(own) for name, file in part.items()}


def _damage(folder: Path) -> list[str]:
    """What of a checkpoint, and of the best one it names, is not as it was written."""
    mark, best = ranks.from_main(lambda: (read_mark(folder), _best(folder)))
    if mark is None:
        return [COMPLETE]
    names = sorted(mark["files"])[ranks.rank() :: ranks.world()]
    wrong = altered_files(folder, mark["files"], names)
    found = [name for part in ranks.all_gather_object(wrong) for name in part]
    if best is not None and best != folder and not found:
        found = [f"{best.name}/{name}" for name in _damage(best)]
    return found


def _best(folder: Path) -> Path | None:
    """The checkpoint that this one would be judged against at the end, None where there is none."""
    try:
        best = json.loads((folder / "trainer_state.json").read_bytes())["best_model_checkpoint"]
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return Path(best) if best else None


def _set_aside(folder: Path, wrong: Sequence[str]) -> None:
    target = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    print(
        f"{folder.name}: {', '.join(wrong[:3])}{' and more' if len(wrong) > 3 else ''} not as"
        f" written: set aside as {target.name}; going on from the checkpoint before it, if there"
        " is one",
        flush=True,
    )


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
