"""What the actions of `grads-ds scores` share: a run's score table and pool, and aligned text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_ds.config.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def table_file(run: Path) -> Path:
    """The run's merged score table. Raises UserError when there is none."""
    file = run / "scores/table.parquet"
    if not file.is_file():
        raise UserError(
            f"{run}: wanted a run directory with scores/table.parquet; found none; run the probe"
            " first"
        )
    return file


def score_table(run: Path) -> pa.Table:
    """The whole table. Raises UserError when there is none."""
    from grads_ds.scores.read import arrow_table

    return arrow_table(table_file(run))


def prepared_pool(run: Path) -> Any:
    """The pool's rows as prepared (grads_ds/selection/pool.py)."""
    from grads_ds.selection.pool import read_pool

    return read_pool(run / "prepared/pool")


def value_columns(table: pa.Table) -> list[str]:
    """Columns that say something about a sample's size of gradient: the loss, then the norms and
    what else was recorded.
    """
    import pyarrow as pa

    return [field.name for field in table.schema if pa.types.is_floating(field.type)]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
