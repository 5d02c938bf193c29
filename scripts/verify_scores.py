"""Check a finished probe against plain autograd: one float64 backward per sample, on samples drawn
at random.

Reads a run directory (resolved.yaml, prepared/pool, scores/table.parquet and the model that was
recorded); writes nothing. Run: python scripts/verify_scores.py RUN_DIR [--samples 32] [--seed 0]
Prints the largest relative difference of every norm column. Exit status 1 when one exceeds
--tolerance (1e-4; use 2e-2 for a probe in bfloat16). Slow and in one process: whole gradients of
one sample at a time must fit in this machine's memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import load_from_disk
from tqdm import tqdm
from transformers import AutoModelForCausalLM

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from grads_ds.config.load import load_config  # noqa: E402
from grads_ds.gradnorm.reference import reference_norms  # noqa: E402
from grads_ds.gradnorm.rules import plan_sites  # noqa: E402


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    config = load_config(options.run_dir / "resolved.yaml")
    table = (
        pq.read_table(options.run_dir / "scores/table.parquet").to_pandas().set_index("sample_id")
    )
    pool = load_from_disk(str(options.run_dir / "prepared/pool"))
    count = min(options.samples, len(pool))
    drawn = sorted(
        np.random.default_rng(options.seed).choice(len(pool), count, replace=False).tolist()
    )
    path = options.run_dir / "probe/model" if config.probe.epochs > 0 else config.model.path
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation=config.model.attention
    )
    layers = config.probe.layers
    plan = plan_sites(model, layers)
    worst = dict.fromkeys(
        ["loss", *(name for name in table.columns if name.endswith("_grad_norm"))], 0.0
    )
    for row in tqdm(pool.select(drawn), desc="one backward per sample", unit="sample"):
        batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
        exact = reference_norms(model, plan, batch, config.probe.loss_reduction)
        values = {f"{group}_grad_norm": norm.item() for group, norm in exact.norms.items()} | {
            "loss": exact.loss.item()
        }
        for name in worst:
            found, wanted = float(table.loc[row["sample_id"], name]), values.get(name, 0.0)
            worst[name] = max(
                worst[name],
                abs(found - wanted) / max(abs(wanted), 1e-12) if found != wanted else 0.0,
            )
    for name, difference in worst.items():
        print(f"{name:24} largest relative difference over {count} samples: {difference:.1e}")
    return int(max(worst.values()) > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
