"""The loss of every target token, where the probe recorded it: a column of the parts alone.

The merged table leaves it out: it is as long as the pool's texts. No torch import.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grads_ds.config.columns import TOKEN_LOSSES
from grads_ds.scores.parts import parts
from grads_ds.statistics import Floats


def read_token_losses(folder: Path, sample_ids: Collection[int]) -> dict[int, Floats]:
    """Per sample its target tokens' losses in nats, in the order of the text, float64 [targets].

    Samples without any are left out; all are where the table of `folder` was recorded without them.
    Raises UserError for a part that was altered.
    """
    try:
        key = json.loads((folder / "manifest.json").read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    wanted, found = pa.array(sorted(sample_ids), pa.int64()), {}
    for file, _ in parts(folder, str(key)):
        if TOKEN_LOSSES not in pq.read_schema(file).names:
            continue
        table = pq.read_table(
            file, columns=["sample_id", TOKEN_LOSSES], page_checksum_verification=True
        )
        table = table.filter(pc.is_in(table["sample_id"], value_set=wanted))
        for sample_id, losses in zip(
            table["sample_id"].to_pylist(), table[TOKEN_LOSSES].to_pylist(), strict=True
        ):
            if losses:
                found[int(sample_id)] = np.asarray(losses, dtype=np.float64)
    return found
