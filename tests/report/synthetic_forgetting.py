"""An evaluation with gain and forgetting as asked for: evaluation.json and its files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds.evaluate.row_files import OWN, rows_file

# name -> method, samples, gain, forgetting
LINE = {
    "frontier-0.05": ("random", 600, 0.11, 0.020),
    "frontier-0.25": ("random", 3000, 0.24, 0.055),
    "frontier-0.5": ("random", 6000, 0.31, 0.090),
    "full": ("full", 12000, 0.36, 0.150),
}
ROWS = 160


def write_forgetting(
    run_dir: Path,
    models: dict[str, tuple[str, int, float, float]],
    between: dict[str, tuple[str, float | None, float | None, float, float]] | None = None,
    noise: float = 0.05,
) -> dict[str, Any]:
    """Write the rows of `models` (as `LINE`) and of what lies between (of, alpha, steps, gain,
    forgetting), and return evaluation.json, which is written too. Rows differ from their model's
    mean by `noise` times it; what is hard for one model is hard for all.
    """
    rng = np.random.default_rng(5)
    shared, choice = rng.normal(0, 1, (2, ROWS)), rng.random(ROWS) < 0.5
    tokens = rng.integers(10, 60, ROWS)
    points = {"base": (0.0, 0.0)} | {name: (m[2], m[3]) for name, m in models.items()}
    points |= {name: (m[3], m[4]) for name, m in (between or {}).items()}
    for name, means in points.items():
        gain, lost = (
            mean * (1 + noise * (shared[i] - np.average(shared[i], weights=tokens)))
            for i, mean in enumerate(means)
        )
        write(run_dir / rows_file(name, "domain"), 3.0 - gain, tokens, choice, gain * 0)
        write(run_dir / rows_file(name, "general"), 2.5 + lost, tokens, choice, lost)
        write(run_dir / rows_file(name, OWN), 1.0 + lost, tokens, choice, lost)
    plain = {"base": (0.0, 0.0)} | {name: (m[2], m[3]) for name, m in models.items()}
    evaluation = {
        "models": {
            name: {
                s: {"loss": loss, "sample_losses_file": rows_file(name, s)}
                for s, loss in (("domain", 3.0 - gain), ("general", 2.5 + lost))
            }
            for name, (gain, lost) in plain.items()
        },
        "variants": {
            name: {"method": method, "budget": 0.1, "num_samples": samples}
            for name, (method, samples, _, _) in models.items()
        },
        "between": {
            name: {"of": of, "alpha": alpha, "steps": steps, "sets": {}}
            for name, (of, alpha, steps, _, _) in (between or {}).items()
        },
        "retention": {
            "plan": {"prompts": ROWS, "share": 0.4, "cost": 0.19},
            "seconds": {"losses": 100.0, "retention": 17.0, "generation": 60.0},
            "models": {"base": {"own_answers": {}}},
        },
    }
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def write(
    file: Path, loss: np.ndarray, tokens: np.ndarray, choice: np.ndarray, kl: np.ndarray
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "loss": loss,
        "num_target_tokens": tokens,
        "choice": choice,
        "kl_sum": kl * tokens,
        "kl_positions": tokens,
    }
    pq.write_table(pa.table(columns), file, write_page_checksum=True)
