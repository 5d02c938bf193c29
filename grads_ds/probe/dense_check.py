"""A second opinion on the merged table: the ranks' scores kept in memory, all-reduced, and compared
with what was written, value by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from grads_ds import scores
from grads_ds.data.batches import BatchPlan
from grads_ds.distributed import ranks
from grads_ds.distributed.reduction import all_reduce_sum
from grads_ds.scores.read import arrow_table

LARGEST = 4_000_000  # rows; beyond it the memory is not worth it


class DenseCheck:
    """`kept` is float32 [N, 1 + len(names)]: how often a row was scored now, then its values; None
    for a pool that is too large.
    """

    def __init__(self, rows: int, names: Sequence[str]) -> None:
        self.names = list(names)
        self.kept = np.zeros((rows, 1 + len(self.names)), np.float32) if rows <= LARGEST else None

    def add(self, indices: Sequence[int], table: pa.Table) -> None:
        """Keep the rows of a micro-batch, which stand at `indices` of the pool."""
        if self.kept is not None:
            values = [table[name].to_numpy() for name in self.names]
            self.kept[list(indices)] += np.column_stack([np.ones(len(indices)), *values])

    def compare(self, plan: BatchPlan, ids: np.ndarray, table_file: Path) -> None:
        """Raises IncompleteScores, and removes the table, where it is not what the ranks scored.

        Every rank calls this. Rows of earlier starts are only in the table.
        """
        if self.kept is None:
            return
        total = all_reduce_sum(self.kept)

        def on_main() -> None:
            scored = np.array(
                sorted(i for rank in plan.batches for batch in rank for i in batch), np.int64
            )
            summed = total[scored]
            table = arrow_table(table_file, ["sample_id", *self.names])
            place = np.searchsorted(table["sample_id"].to_numpy(), ids[scored])
            written = np.stack([table[name].to_numpy()[place] for name in self.names], axis=1)
            once = bool((summed[:, 0] == 1).all())
            if not once or not np.array_equal(summed[:, 1:], written, equal_nan=True):
                table_file.unlink()
                raise scores.IncompleteScores(
                    f"{table_file} differed from the ranks' own scores in memory and was removed;"
                    f" look at the disk, then remove {table_file.parent} and score again"
                )

        ranks.from_main(on_main)
