"""The columns of the score table and the rows of one micro-batch.

Reads and writes nothing; no torch import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from grads_ds.config.probe import LAYER_GROUPS

STATUSES = ("ok", "no_target", "nonfinite")
STEP = "step"  # in tables recorded while training: the optimizer step whose model gave the row


def columns(layers: Sequence[str] | str) -> list[str]:
    """Names of the norm columns for the recorded groups, e.g.

    embedding_grad_norm; total only when all are recorded.
    """
    names = [*LAYER_GROUPS, "other"] if layers == "all" else list(layers)
    return [f"{name}_grad_norm" for name in names] + (
        ["total_grad_norm"] if layers == "all" else []
    )


def schema(norm_columns: Sequence[str], with_step: bool = False) -> pa.Schema:
    """The table's columns and types."""
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("sample_hash", pa.string()),
            ("num_tokens", pa.int32()),
            ("num_target_tokens", pa.int32()),
            ("loss", pa.float32()),
            *((name, pa.float32()) for name in norm_columns),
            ("status", pa.string()),
            *([(STEP, pa.int32())] if with_step else []),
        ]
    )


def make_rows(
    samples: Sequence[Mapping[str, Any]],
    loss: np.ndarray,
    num_target_tokens: np.ndarray,
    norms: Mapping[str, np.ndarray],
    extras: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Table rows of one micro-batch. `norms` and `extras` map column names to [B].

    A norm that is not finite is flagged, and kept; an extra column may be NaN where it does not
    exist for a sample.
    """
    rows = []
    for b, sample in enumerate(samples):
        values = {name: float(column[b]) for name, column in norms.items()}
        # as the table holds them: a norm beyond float32 is infinite there
        with np.errstate(over="ignore"):
            finite = bool(
                np.isfinite(np.array([float(loss[b]), *values.values()]).astype(np.float32)).all()
            )
        status = "nonfinite" if not finite else "no_target" if num_target_tokens[b] == 0 else "ok"
        rows.append(
            {
                "sample_id": int(sample["sample_id"]),
                "sample_hash": sample["sample_hash"],
                "num_tokens": len(sample["input_ids"]),
                "num_target_tokens": int(num_target_tokens[b]),
                "loss": float(loss[b]),
                **values,
                **{name: float(column[b]) for name, column in (extras or {}).items()},
                "status": status,
            }
        )
    return rows
