"""The score table's schema, and the rows of one micro-batch as an Arrow table.

Reads and writes nothing; no torch import. The names come from `config.columns`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from grads_ds.config.columns import FIRST, LAST, STATUSES, STEP, TOKEN_LOSSES

OK, NO_TARGET, NONFINITE = STATUSES


def schema(value_columns: Sequence[str], with_step: bool = False) -> pa.Schema:
    """The table's columns and types; `value_columns`: names of the norms and extra columns."""
    step = ((STEP, "int32"),) if with_step else ()
    values = tuple((name, "float32") for name in value_columns)
    kinds = {TOKEN_LOSSES: pa.list_(pa.float32())}
    return pa.schema(
        [
            (name, kinds.get(name) or pa.type_for_alias(kind))
            for name, kind in (*FIRST, *values, *LAST, *step)
        ]
    )


def make_rows(
    samples: Mapping[str, Sequence[object] | np.ndarray],
    loss: np.ndarray,
    num_target_tokens: np.ndarray,
    norms: Mapping[str, np.ndarray],
    extras: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> pa.Table:
    """The rows of one micro-batch of B samples, with the columns of `schema`.

    A loss or norm that is not finite is flagged, and kept; an extra column may be NaN where it does
    not exist for a sample.

    Args:
        samples: sample_id, sample_hash and num_tokens, each [B].
        loss, num_target_tokens: [B].
        norms, extras: column name -> [B]; of token_losses B lists.
        step: the optimizer step whose model gave the rows, in a table recorded while training.
    """
    count = len(loss)
    # as the table holds them: a norm beyond float32 is infinite there
    with np.errstate(over="ignore"):
        named = {"loss": loss, **norms, **(extras or {})}
        values = {
            name: value if name == TOKEN_LOSSES else np.asarray(value).astype(np.float32)
            for name, value in named.items()
        }
    finite = np.ones(count, bool)
    for name in ("loss", *norms):
        finite &= np.isfinite(values[name])
    status = np.where(
        finite, np.where(np.asarray(num_target_tokens) == 0, NO_TARGET, OK), NONFINITE
    )
    columns = {
        **{name: samples[name] for name in ("sample_id", "sample_hash", "num_tokens")},
        "num_target_tokens": num_target_tokens,
        **values,
        "status": status.astype(object),
    }
    if step is not None:
        columns[STEP] = np.full(count, step)
    wanted = schema([*norms, *(extras or {})], with_step=step is not None)
    return pa.table([pa.array(columns[field.name], field.type) for field in wanted], schema=wanted)
