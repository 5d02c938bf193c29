"""The norms that the model had before the preliminary training, kept aside for `extras: early`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grads_ds.run_dir.publish import atomic_path


@dataclass(frozen=True)
class EarlyNorms:
    """The early pass's own table: ids int64 [N], ascending, and norms float32 [N] by the name of
    their column here.
    """

    ids: np.ndarray
    norms: dict[str, np.ndarray]

    @classmethod
    def read(cls, run_dir: Path, names: Sequence[str]) -> EarlyNorms:
        table = pq.read_table(
            run_dir / "scores/early/table.parquet",
            columns=["sample_id", *names],
            page_checksum_verification=True,
        )
        return cls(
            table["sample_id"].to_numpy(),
            {f"{name}_early": table[name].to_numpy() for name in names},
        )

    def of(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        places = np.searchsorted(
            self.ids, np.array([sample["sample_id"] for sample in samples], np.int64)
        )
        return {name: values[places].astype(np.float64) for name, values in self.norms.items()}


def kept_for(file: Path) -> str | None:
    """Which recording the anchor's gradient in `file` was taken for; None where there is none, or a
    damaged one.
    """
    try:
        with safe_open(file, "pt") as kept:
            return (kept.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None


def keep(file: Path, gradients: Mapping[str, Tensor], key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as aside:
        save_file(
            {name: gradient.cpu().contiguous() for name, gradient in gradients.items()},
            aside,
            {"key": key},
        )
