"""The norms that the model had before the preliminary training, read for `extras: [early]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.scores.read import arrow_table


@dataclass(frozen=True)
class EarlyNorms:
    """The early pass's own table: ids int64 [N], ascending, and norms float32 [N] by the name of
    their column here.
    """

    ids: np.ndarray
    norms: dict[str, np.ndarray]

    @classmethod
    def read(cls, run_dir: Path, names: Sequence[str]) -> EarlyNorms:
        """Read the norm columns `names` of scores/early/table.parquet."""
        table = arrow_table(run_dir / "scores/early/table.parquet", ["sample_id", *names])
        return cls(
            table["sample_id"].to_numpy(),
            {f"{name}_early": table[name].to_numpy() for name in names},
        )

    def of(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The early norms of these samples, float64 [B] by column."""
        places = np.searchsorted(
            self.ids, np.array([sample["sample_id"] for sample in samples], np.int64)
        )
        return {name: values[places].astype(np.float64) for name, values in self.norms.items()}
