"""What can be added up over rows, parts and ranks, so that no row is lost, doubled or altered
unseen. No torch import.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grads_ds.config.columns import STATUSES, STEP, TOKEN_LOSSES
from grads_ds.statistics import splitmix

# columns whose values are not summed
_COUNTED = ("sample_id", "sample_hash", "status", STEP, TOKEN_LOSSES)


def summed_columns(table_schema: pa.Schema) -> list[str]:
    """The columns that `Totals` adds up."""
    return [name for name in table_schema.names if name not in _COUNTED]


@dataclass
class Totals:
    """What can be added up over ranks: `counts` int64 [rows, id sum, id digest, one per status];
    `sums` float64 per summed column.

    The digest adds up a scrambled form of every id, modulo 2^64: two wrong ids that happen to add
    up do not pass. Sums leave out values that are not finite; those are counted by status.
    """

    columns: list[str]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(3 + len(STATUSES), np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.sums.size:
            self.sums = np.zeros(len(self.columns))

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table with the summed columns, sample_id and status."""
        ids = table["sample_id"].to_numpy()
        statuses = table["status"]
        by_status = [int(pc.sum(pc.equal(statuses, status)).as_py() or 0) for status in STATUSES]
        with np.errstate(over="ignore"):
            self.counts += [
                len(ids),
                int(ids.sum()),
                int(splitmix(ids.astype(np.uint64)).sum().view(np.int64)),
                *by_status,
            ]
        for place, name in enumerate(self.columns):
            values = table[name].to_numpy().astype(np.float64)
            self.sums[place] += values[np.isfinite(values)].sum()

    def __add__(self, other: Totals) -> Totals:
        with np.errstate(over="ignore"):
            return Totals(self.columns, self.counts + other.counts, self.sums + other.sums)

    def differences(self, other: Totals) -> list[str]:
        """In words, what is not the same; sums may differ by rounding, 1e-9 of them."""
        names = ["rows", "sum of ids", "digest of ids", *STATUSES]
        found = [
            f"{name} {a} and {b}"
            for name, a, b in zip(names, self.counts, other.counts, strict=True)
            if int(a) != int(b)
        ]
        close = np.isclose(self.sums, other.sums, rtol=1e-9, atol=0)
        return found + [
            f"sum of {self.columns[i]} {self.sums[i]!r} and {other.sums[i]!r}"
            for i in np.flatnonzero(~close)
        ]

    def status(self) -> dict[str, int]:
        """Rows by status."""
        return dict(zip(STATUSES, self.counts[3:].tolist(), strict=True))
