"""Evaluation: held-out loss of the base model and of every trained one, on each named validation
set.

Reads `prepared/<validation name>` and the models; writes `evaluation.json` and every sample's loss
under `evaluation/`. A set's loss is the mean over its target tokens, its interval a bootstrap over
samples. Run by `grads-ds evaluate CONFIG` or `deepspeed --hostfile H --module grads_ds evaluate
CONFIG`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_from_disk

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.engine.frozen_pass import score_samples
from grads_ds.evaluate.tasks import run_tasks, wants_tasks
from grads_ds.run_dir.layout import model_folder, selection_folder, trained_names
from grads_ds.run_dir.publish import atomic_path, publish_json
from grads_ds.statistics import bootstrap_interval


def run_evaluate(config: Config, run_dir: Path) -> None:
    """Measure every model on every validation set. Every rank calls this."""
    models = {
        "base": config.model.path,
        **{name: str(run_dir / model_folder(name)) for name in trained_names(config)},
    }
    sets = {
        name: load_from_disk(str(run_dir / "prepared" / name)) for name in config.data.validation
    }
    result: dict[str, dict[str, Any]] = {}
    for model_name, path in models.items():
        result[model_name] = {}
        for set_name, rows in sets.items():
            loss, tokens = sample_losses(config, path, rows, f"{model_name} on {set_name}")
            losses_file = f"evaluation/{model_name}.{set_name}.parquet"
            if ranks.is_main():
                with atomic_path(run_dir / losses_file) as aside:
                    columns = pa.table({"loss": loss, "num_target_tokens": tokens})
                    pq.write_table(columns, aside, write_page_checksum=True)
            result[model_name][set_name] = summarise(
                loss, tokens, config.evaluate.bootstrap, config.seed
            ) | {"sample_losses_file": losses_file}
    tasks = (
        {name: run_tasks(config, path, name) for name, path in models.items()}
        if wants_tasks(config.evaluate)
        else {}
    )
    if ranks.is_main():
        pool = len(load_from_disk(str(run_dir / "prepared/pool")))
        variants = {name: _described(config, run_dir, name, pool) for name in trained_names(config)}
        publish_json(
            run_dir / "evaluation.json", {"models": result, "tasks": tasks, "variants": variants}
        )


def sample_losses(
    config: Config, model_path: str, rows: Any, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's mean loss over its target tokens (nats) and their number, float64 and int64
    [N], on every rank.
    """
    mine: dict[int, tuple[float, int]] = {}
    for indices, scored in score_samples(
        config,
        model_path,
        rows,
        range(len(rows)),
        (),
        "mean",
        config.evaluate.tokens_per_microbatch,
        what,
    ):
        mine |= dict(
            zip(
                indices,
                zip(scored.loss.tolist(), scored.num_target_tokens.tolist(), strict=True),
                strict=True,
            )
        )
    every = {
        index: value for part in ranks.all_gather_object(mine) for index, value in part.items()
    }
    assert len(every) == len(rows), f"{what}: {len(every)} of {len(rows)} samples were scored"
    pairs = [every[i] for i in range(len(rows))]
    return np.array([loss for loss, _ in pairs], np.float64), np.array(
        [count for _, count in pairs], np.int64
    )


def summarise(loss: np.ndarray, tokens: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Token-mean loss, perplexity and the loss's 95 % bootstrap interval (percentile method,
    samples redrawn whole).

    `loss` float64 [N] is each sample's mean over its target tokens, `tokens` int64 [N] their
    number.
    """
    mean = float((loss * tokens).sum() / tokens.sum())
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "loss_ci95": list(bootstrap_interval(loss, resamples, seed, tokens)),
        "num_samples": len(loss),
        "num_target_tokens": int(tokens.sum()),
    }


def _described(config: Config, run_dir: Path, name: str, pool: int) -> dict[str, Any]:
    if name == "full":
        return {"method": "full", "budget": 1.0, "num_samples": pool}
    chosen = config.select.resolve(None if name == "selected" else name)
    rows = (run_dir / selection_folder(name) / "selected.jsonl").read_text().count("\n")
    return {"method": chosen.method, "budget": chosen.budget, "num_samples": rows}
