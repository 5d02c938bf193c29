"""One rank of a measurement for scripts/bench/plan_errors.py: bytes of tensors alive, bytes into
collectives, or seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# arguments of each collective: (where its whole tensor stands, how often (N-1)/N of it passes a
# rank)
COLLECTIVES = {
    "all_gather_into_tensor": (0, "output_tensor", 1),
    "reduce_scatter_tensor": (1, "input", 1),
    "all_reduce": (0, "tensor", 2),
    "all_to_all_single": (1, "input", 1),
}


def rank(folder: Path) -> None:
    """One rank of a case, which ends with its process."""
    measure(folder)
    sys.stdout.flush()
    os._exit(0)


def measure(folder: Path) -> None:
    """Join the other ranks, run a case, write what it took to `folder`/rank<N>.json and leave."""
    import torch.distributed as dist

    moved = {"bytes": 0.0}

    def counted(original: Any, place: int, keyword: str, times: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            whole = kwargs[keyword] if keyword in kwargs else args[place]
            count = dist.get_world_size(kwargs.get("group"))
            moved["bytes"] += whole.numel() * whole.element_size() * times * (count - 1) / count
            return original(*args, **kwargs)

        return call

    for name, (place, keyword, times) in COLLECTIVES.items():  # before DeepSpeed looks them up
        setattr(dist, name, counted(getattr(dist, name), place, keyword, times))

    from grads_ds.config.load import load_config
    from grads_ds.distributed import ranks
    from grads_ds.engine.live_bytes import LiveBytes

    ranks.start()
    config = load_config(folder / "config.yaml")
    counter = LiveBytes("cpu")
    timed = (folder / "timed").exists()
    rate = 0.0
    if timed:
        import torch

        from grads_ds.plan.calibrate import calibrate
        from grads_ds.plan.shapes import model_config

        rows = config.sft.micro_batch_size
        rate = calibrate(
            model_config(config.model.path),
            torch.float32,
            rows,
            config.data.max_length,
            time.process_time,
        )
    with contextlib.nullcontext() if timed else counter:
        found = (_train if (folder / "sft").exists() else _record)(config, folder, counter, moved)
    (folder / f"rank{ranks.rank()}.json").write_text(json.dumps(found | {"rate": rate}))
    ranks.barrier()
    ranks.finish()


def _train(config: Any, folder: Path, counter: Any, moved: dict[str, float]) -> dict[str, float]:
    from datasets import load_from_disk
    from transformers import TrainerCallback

    from grads_ds.training.train import TrainingJob, train_model

    seen: dict[str, float] = {}

    class Window(TrainerCallback):
        """The third step: the second still allocates, and DeepSpeed learns the modules' order in
        the first two.
        """

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counter.peak, moved["bytes"] = counter.now, 0.0
            self.began = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spent = time.process_time() - self.began
            seen.update(
                peak=counter.peak,
                bytes=moved["bytes"],
                seconds=min(spent, seen.get("seconds", spent)),
            )

    rows = load_from_disk(str(folder / "run/prepared/pool")).select_columns(["input_ids", "labels"])
    train_model(
        TrainingJob(
            config,
            config.sft,
            rows,
            config.model.path,
            folder / "out",
            folder / "work",
            folder / "logs",
            3,
            "sft",
            callbacks=[Window()],
            sequence=config.sft.sequence_parallel,
            identity="bench",
        )
    )
    return seen


def _record(config: Any, folder: Path, counter: Any, moved: dict[str, float]) -> dict[str, float]:
    from functools import partial

    from datasets import load_from_disk

    from grads_ds.data.batches import plan_batches
    from grads_ds.distributed import ranks
    from grads_ds.engine import frozen_pass
    from grads_ds.engine.frozen_pass import lengths_of, score_plan
    from grads_ds.probe.extra_columns import ExtraColumns

    pool = load_from_disk(str(folder / "run/prepared/pool"))
    lengths = lengths_of(pool)
    plan = plan_batches(lengths, ranks.world(), config.probe.tokens_per_microbatch, config.seed)
    beside = partial(ExtraColumns, config, folder / "run", "key") if config.probe.extras else None
    found: list[dict[str, float]] = []
    original = frozen_pass.with_progress

    def loaded(*args: Any) -> Any:  # the pass begins here: what loading took is left out
        if not config.probe.extras:
            counter.peak = counter.now
        return original(*args)

    frozen_pass.with_progress = loaded
    began = time.process_time()
    for _ in score_plan(
        config,
        config.model.path,
        pool,
        plan,
        lengths,
        config.probe.layers,
        "mean",
        "probe",
        None,
        beside,
    ):
        now = time.process_time()
        found.append({"peak": counter.peak, "bytes": moved["bytes"], "seconds": now - began})
        began = now
        counter.peak, moved["bytes"] = counter.now, 0.0
    # the first micro-batch is checked; its peak holds the anchor's gradient being taken as well
    found[-1]["seconds"] = min(f["seconds"] for f in found)
    return found[-1] | {"peak": max(f["peak"] for f in found)}
