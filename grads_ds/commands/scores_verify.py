"""`grads-ds scores verify RUN`: a finished probe against plain autograd, on random samples.

Reads a run directory (its config, prepared/pool, scores/table.parquet and the model that was
recorded); writes nothing. One float64 backward per sample, slow and in one process: the model and
the whole gradient of one sample must fit in this machine's memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from grads_ds.commands.score_tables import score_table
from grads_ds.config.errors import UserError

# largest relative difference that rounding explains, by the dtype of the recorded pass
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def add(actions: Any) -> None:
    """Declare `verify`."""
    verify = actions.add_parser(
        "verify", help="recompute samples' losses and norms by one float64 backward each, compare"
    )
    verify.add_argument("run", metavar="RUN", type=Path, help="run directory")
    verify.add_argument("--samples", type=int, default=32, metavar="N", help="default 32")
    verify.add_argument("--seed", type=int, default=0, help="which samples are drawn")
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="relative difference allowed (default: 1e-4, of a pass in 16 bits 2e-2)",
    )
    verify.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    """Print the largest difference of every column; exit status 1 when one is too large."""
    import math

    from grads_ds.config.load import load_config
    from grads_ds.run_dir.provenance import RESOLVED

    config = load_config(args.run / RESOLVED)
    tolerance = TOLERANCE[config.model.dtype] if args.tolerance is None else args.tolerance
    worst, count = differences(config, args.run, args.samples, args.seed)
    for name, difference in worst.items():
        print(f"{name:24} largest relative difference over {count} samples: {difference:.1e}")
    wrong = [name for name, x in worst.items() if math.isnan(x) or x > tolerance]
    if wrong:
        print(f"beyond {tolerance:g}: {', '.join(wrong)}")
    return int(bool(wrong))


def differences(config: Any, run: Path, samples: int, seed: int) -> tuple[dict[str, float], int]:
    """The largest relative difference of the loss and of every norm column, and over how many
    samples of status ok.

    Raises UserError where the table is not that of one model, or has no sample to compare.
    """
    import numpy as np
    from datasets import load_from_disk
    from tqdm import tqdm

    from grads_ds.config.columns import norm_columns

    if config.probe.record == "during":
        raise UserError(
            "wanted the scores of one model; found probe.record: during, whose rows belong to the"
            " steps of a training; verify a run with probe.record: after"
        )
    table = score_table(run)
    names = ["loss", *norm_columns(config.probe.layers)]
    pool = load_from_disk(str(run / "prepared/pool"))
    places = {int(sample): i for i, sample in enumerate(table["sample_id"].to_pylist())}
    statuses = table["status"].to_pylist()
    scored = [
        i for i, sample in enumerate(pool["sample_id"]) if statuses[places[int(sample)]] == "ok"
    ]
    count = min(samples, len(scored))
    if count < 1:
        raise UserError(
            f"{run}: wanted samples of status ok to compare; found {len(scored)} of them and"
            f" --samples {samples}"
        )
    drawn = sorted(np.random.default_rng(seed).choice(scored, count, replace=False).tolist())
    measure = _reference(config, run)
    worst = dict.fromkeys(names, 0.0)
    for row in tqdm(pool.select(drawn), desc="one backward per sample", unit="sample"):
        exact = measure(row)
        for name in names:
            found = float(table[name][places[row["sample_id"]]].as_py())
            wanted = exact.get(name, 0.0)
            difference = abs(found - wanted) / max(abs(wanted), 1e-12) if found != wanted else 0.0
            worst[name] = float(np.maximum(worst[name], difference))  # NaN stays
    return worst, count


def _reference(config: Any, run: Path) -> Any:
    """row -> its exact loss and norms by column name, from the model that was recorded."""
    import torch
    from transformers import AutoModelForCausalLM

    from grads_ds.engine.attention import attention_of
    from grads_ds.gradnorm.reference import reference_norms
    from grads_ds.gradnorm.trial.site_plan import plan_sites

    attention = attention_of(config)
    model = AutoModelForCausalLM.from_pretrained(
        run / "probe/model" if config.probe.epochs > 0 else config.model.path,
        dtype=torch.float64,
        attn_implementation="sdpa" if attention.startswith("flash") else attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    plan = plan_sites(model, config.probe.layers)

    def measure(row: dict[str, Any]) -> dict[str, float]:
        batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
        exact = reference_norms(model, plan, batch, config.probe.loss_reduction)
        norms = {f"{group}_grad_norm": norm.item() for group, norm in exact.norms.items()}
        return norms | {"loss": exact.loss.item()}

    return measure
