"""The evaluation, the comparison of methods and the curves of a synthetic run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.config import Config

LOSSES = {  # model -> (domain, general)
    "base": (3.2143, 2.5071),
    "full": (2.7012, 2.6389),
    "selected": (2.8125, 2.5198),
    "random_5": (2.8931, 2.5312),
    "grads_50": (2.7204, 2.5633),
    "random_50": (2.7311, 2.5702),
}


COMPARED = {  # method -> budget -> (overlap, {kind: share kept})
    "grads density": {
        "0.05": (60, {"clean": 0.08, "off_domain": 0.0}),
        "0.5": (60, {"clean": 0.61, "off_domain": 0.125}),
    },
    "random": {
        "0.05": (3, {"clean": 0.05, "off_domain": 0.05}),
        "0.5": (31, {"clean": 0.5, "off_domain": 0.49}),
    },
}


def comparison(n: int) -> dict[str, Any]:
    """selection/comparison.json with `COMPARED`, and one method that could not be run."""
    methods = {
        method: {
            budget: {
                "samples": round(float(budget) * n),
                "overlap_with_selected": overlap,
                "jaccard_with_selected": 0.5,
                "kept": {"kind": kept},
            }
            for budget, (overlap, kept) in entries.items()
        }
        for method, entries in COMPARED.items()
    }
    return {
        "budgets": ["0.05", "0.5"],
        "methods": methods,
        "skipped": {"ifd": "select: wanted column ifd"},
    }


def evaluation(n: int, losses: dict[str, tuple[float, float]], config: Config) -> dict[str, Any]:
    """evaluation.json for the models of `config`."""
    names = ["base", "selected", *config.sft.variants]
    models = {
        name: {
            set_name: {
                "loss": loss,
                "perplexity": float(np.exp(loss)),
                "loss_ci95": [loss - 0.04, loss + 0.05],
                "num_samples": 200,
                "num_target_tokens": 9000,
            }
            for set_name, loss in zip(("domain", "general"), losses[name], strict=True)
        }
        for name in names
    }
    about: dict[str, Any] = {"full": {"method": "full", "budget": 1.0, "num_samples": n}}
    for name in names:
        if name not in ("base", "full"):
            chosen = config.select.resolve(None if name == "selected" else name)
            about[name] = {
                "method": chosen.method,
                "budget": chosen.budget,
                "num_samples": round(float(chosen.budget) * n),
            }
    return {"models": models, "variants": {name: about[name] for name in names if name != "base"}}


def write_curve(folder: Path, steps: int, start: float) -> None:
    """A TensorBoard event file with train/loss falling from `start`."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step in range(1, steps + 1):
        value = Summary.Value(tag="train/loss", simple_value=start * (0.7 + 0.3 / step**0.5))
        writer.add_event(Event(wall_time=1e9 + step, step=step, summary=Summary(value=[value])))
    writer.close()
