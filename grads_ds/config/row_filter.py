"""An entry of `select.filters`: which rows are never chosen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from grads_ds.config.record import Record


class Filter(Record):
    """Rows that are never chosen: those on one side of a cut through a column of the score table.

    `auto` takes side and cut from the probe's controls, and rejects nothing where the controls'
    area under the curve is below 0.75.
    """

    column: str = Field(description="any column of the score table, e.g. ifd")
    reject: Literal["auto", "high", "low"] = Field(
        "auto", description="which side is rejected; auto: the side of the controls"
    )
    cut: float | Literal["auto"] = Field(
        "auto", description="where; auto: where a row is more like the controls than like the pool"
    )
    by_length: bool = Field(
        True, description="compare a row with rows of like length (its share of them, 0 to 1)"
    )
    against: str | None = Field(
        None,
        description=(
            "kind of control: swapped, general (null: the one of these that the column tells best),"
            " or reference: rows unlike those of probe.anchor are rejected"
        ),
    )
