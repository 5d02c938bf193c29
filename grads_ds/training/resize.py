"""A checkpoint that another number of ranks wrote: has it rewritten before it is loaded.

Reads a finished checkpoint folder; writes the universal one beside the ranks' parts, by a process
of its own (grads_ds/training/universal_checkpoint.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from grads_ds.distributed import heartbeat, ranks
from grads_ds.launcher.runners import TORCH_VARIABLES
from grads_ds.training.checkpoint_mark import altered_files, read_mark
from grads_ds.training.universal_checkpoint import VERIFIED


def needs_universal(checkpoint: str | Path) -> bool:
    """Whether other ranks wrote the checkpoint than run now, and each wrote a part of the
    optimizer.
    """
    folder = Path(checkpoint)
    wrote = (read_mark(folder) or {}).get("ranks")
    return bool(wrote != ranks.world() and any(folder.glob("global_step*/*optim_states.pt")))


def make_universal(checkpoint: str | Path) -> None:
    """Rewrite the checkpoint so that any number of ranks can load it, unless that was done already
    and is as it was written. Every rank calls this.

    Rank 0 has it converted and compared in a process of its own, which takes memory and worker
    processes. That may last longer than a collective or a rank without progress is given: meanwhile
    all ranks look for the mark and say that they live.
    """
    folder = Path(checkpoint)
    source = next(folder.glob("global_step*"))
    target = folder / f"universal_{source.name}"
    doing = (
        f"{folder.name}: rewriting it for {ranks.world()} rank{'s' if ranks.world() > 1 else ''}"
    )
    process = None
    if ranks.from_main(lambda: not _whole(target)):
        if ranks.is_main():
            shutil.rmtree(target, ignore_errors=True)
        ranks.barrier()
        process = _convert(source, target, doing) if ranks.is_main() else None
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


def _whole(target: Path) -> bool:
    """Whether a universal checkpoint is there, compared, and as it was written."""
    try:
        files = json.loads((target / VERIFIED).read_bytes())
        return not altered_files(target, files, files)
    except (FileNotFoundError, ValueError):
        return False


def _convert(source: Path, target: Path, doing: str) -> subprocess.Popen[bytes]:
    print(doing, flush=True)
    alone = {name: value for name, value in os.environ.items() if name not in TORCH_VARIABLES}
    module = "grads_ds.training.universal_checkpoint"
    with open(source.parent / "universal.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(source), str(target)],
            env=alone,
            stdout=log,
            stderr=log,
        )
