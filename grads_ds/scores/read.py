"""The score table in memory: numpy columns in the order of sample_id, and which rows can be chosen
at all; or as it lies in its file, whole or some of its columns.

Reads scores/table.parquet. A column that a method needs and the table lacks is refused by name,
with the way to record it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from grads_ds.config.columns import NORM_SUFFIX, how_to_record
from grads_ds.config.errors import UserError
from grads_ds.statistics import Floats, Ints


@dataclass(frozen=True)
class ScoreTable:
    """`sample_id` (ascending, unique), `status` (indices into `status_words`), the other columns by
    name. `controls`: the table of the probe's controls by kind, where it recorded any;
    `no_controls`: it was to, and none could be made.
    """

    sample_id: Ints
    status: NDArray[np.int8]
    status_words: tuple[str, ...]
    columns: Mapping[str, NDArray[np.generic]]
    controls: Mapping[str, ScoreTable] = field(default_factory=dict)
    no_controls: bool = False

    def __len__(self) -> int:
        return len(self.sample_id)

    @property
    def norm_groups(self) -> list[str]:
        """Names of the groups whose gradient norms were recorded."""
        return [
            name.removesuffix(NORM_SUFFIX) for name in self.columns if name.endswith(NORM_SUFFIX)
        ]

    def floats(self, name: str) -> Floats:
        """A column as float64. Raises UserError when the table has no such column."""
        if name not in self.columns:
            raise UserError(
                f"select: wanted column {name} in the score table; found"
                f" {', '.join(self.columns) or 'none'}; record it:"
                f" {how_to_record(name)}, or choose another method"
            )
        return np.asarray(self.columns[name], dtype=np.float64)

    def norms(self, group: str) -> Floats:
        """The gradient norms of one group, float64."""
        return self.floats(group + NORM_SUFFIX)

    def prefixed(self, prefix: str) -> dict[str, Floats]:
        """Every column whose name starts so, by the rest of its name.

        Raises UserError when there is none.
        """
        found = {
            name.removeprefix(prefix): self.floats(name)
            for name in self.columns
            if name.startswith(prefix)
        }
        if not found:
            self.floats(prefix + "<group>")
        return found

    def rows(self, keep: NDArray[np.bool_] | Ints) -> ScoreTable:
        """The table restricted to some rows, in their order."""
        return ScoreTable(
            self.sample_id[keep],
            self.status[keep],
            self.status_words,
            {name: values[keep] for name, values in self.columns.items()},
            self.controls,
            self.no_controls,
        )

    def count_by_status(self) -> dict[str, int]:
        """Rows per status, every status that occurs."""
        counts = np.bincount(self.status, minlength=len(self.status_words))
        return {
            word: int(count) for word, count in zip(self.status_words, counts, strict=True) if count
        }

    def eligible(self) -> NDArray[np.bool_]:
        """Rows that may be chosen: status ok, and a finite loss and finite, non-negative norms."""
        good = self.status == (self.status_words.index("ok") if "ok" in self.status_words else -1)
        for name, values in self.columns.items():
            if name.endswith(NORM_SUFFIX):
                good &= np.isfinite(values)
                good &= np.greater_equal(values, 0)
            elif name == "loss":
                good &= np.isfinite(values)
        return good


def arrow_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A finished score table as it lies in its file (ascending sample_id), its pages checked; of
    its columns those named, or all. Raises OSError where a page is damaged.
    """
    names = None if columns is None else list(columns)
    return pq.read_table(path, columns=names, page_checksum_verification=True)


def read_table(path: Path) -> ScoreTable:
    """Read the merged score table.

    Raises UserError when it is missing, empty, or holds a sample twice.
    """
    if not path.is_file():
        raise UserError(
            f"select: wanted the score table; found none at {path}; run the probe first"
        )
    # the hashes are a gigabyte of text that no choice looks at
    wanted = [name for name in pq.read_schema(path).names if name != "sample_hash"]
    options = {"columns": wanted, "read_dictionary": ["status"]}
    table = from_arrow(pq.read_table(path, page_checksum_verification=True, **options))
    folder = path.parent / "controls"
    kinds = folder / "kinds.parquet"
    if not kinds.is_file():
        return table
    known = pq.read_table(kinds, page_checksum_verification=True)
    controls = _controls(folder / "table.parquet", known) if known.num_rows else {}
    return replace(table, controls=controls, no_controls=not known.num_rows)


def _controls(path: Path, known: pa.Table) -> dict[str, ScoreTable]:
    """The controls' scores by kind; none where the probe has not recorded them yet."""
    if not path.is_file():
        return {}
    table = from_arrow(arrow_table(path))
    of = dict(zip(known["sample_id"].to_pylist(), known["kind"].to_pylist(), strict=True))
    kind = np.array([of[i] for i in table.sample_id.tolist()])
    good = table.eligible()
    return {str(name): table.rows((kind == name) & good) for name in sorted(set(kind[good]))}


def from_arrow(table: pa.Table) -> ScoreTable:
    """The table with its rows in the order of sample_id. Raises UserError as `read_table` does."""
    if table.num_rows == 0:
        raise UserError(
            "select: wanted scores of at least one sample; found an empty score table; check the"
            " pool"
        )
    sample_id = np.asarray(table["sample_id"].to_numpy(), dtype=np.int64)
    # a handful of distinct words for millions of rows: decode the dictionary, not the column
    column = table["status"]
    coded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    coded = coded.unify_dictionaries().combine_chunks()
    words = [str(word) for word in coded.dictionary.to_pylist()]
    # alphabetical, so that nothing depends on the order of rows
    recode = np.array([sorted(words).index(word) for word in words], dtype=np.int8)
    status = recode[np.asarray(coded.indices.to_numpy(zero_copy_only=False), dtype=np.int64)]
    columns: dict[str, NDArray[np.generic]] = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if name != "sample_id" and (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            columns[name] = table[name].to_numpy()
    if np.any(sample_id[1:] <= sample_id[:-1]):
        order = np.argsort(sample_id, kind="stable")
        sample_id, status = sample_id[order], status[order]
        columns = {name: values[order] for name, values in columns.items()}
    twice = sample_id[1:][sample_id[1:] == sample_id[:-1]]
    if len(twice):
        raise UserError(
            f"select: wanted every sample once in the score table; found {len(twice)} repeated, the"
            f" first sample_id {twice[0]}; run the probe again"
        )
    return ScoreTable(sample_id, status, tuple(sorted(words)), columns)
