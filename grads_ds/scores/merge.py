"""Parts -> `scores/table.parquet` and `scores/manifest.json`, in ranges of ids, so that memory
stays near one range.

Rows are dealt to ranges of the pool's ids, spilled beside the table when there is more than one
range, then sorted, checked and written range by range. Nothing is published unless every id is
there exactly once and the sums are the ranks' own. No torch import.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds.config.columns import STEP, TOKEN_LOSSES
from grads_ds.run_dir.publish import atomic_path, publish_json
from grads_ds.scores.parts import parts
from grads_ds.scores.totals import Totals, summed_columns

RANGE_ROWS = 500_000  # rows sorted at a time: about 100 MB with ten columns
SHOWN = 5


class IncompleteScores(RuntimeError):
    """The merged parts are not exactly the pool."""


def merge(
    folder: Path,
    key: str,
    expected_ids: np.ndarray,
    manifest: Mapping[str, Any],
    expected: Totals | None = None,
    range_rows: int = RANGE_ROWS,
) -> Totals:
    """Merge the parts into `table.parquet`, ordered by id, and write `manifest.json`; returns the
    table's totals.

    Raises IncompleteScores unless every expected id (int64 [N]) is there once and the totals, with
    those of rows left out, are the `expected` ones; then nothing is published. A row that stands
    there twice, the same in every column (two starts were at work), is taken once. Of rows recorded
    while training, which may see a sample twice, the earliest step's is taken.
    """
    files, starts = [], {}
    for file, recording in parts(folder, key):
        files.append(file)
        starts[repr(sorted(recording.start.items()))] = recording.start
    if not files:
        raise IncompleteScores(f"{folder}: no parts to merge")
    table_schema = _merged_schema(files[0])
    wanted = np.sort(np.asarray(expected_ids, np.int64))
    totals, left_out = (Totals(summed_columns(table_schema)) for _ in range(2))
    problems = _Problems()
    with (
        atomic_path(folder / "table.parquet") as aside,
        pq.ParquetWriter(aside, table_schema, write_page_checksum=True) as writer,
    ):
        for ids, table in _ranges(folder, files, wanted, range_rows):
            table, twins = _sorted(table)
            left_out.add(twins)
            problems.look(ids, table["sample_id"].to_numpy())
            totals.add(table)
            writer.write_table(table)
        problems.raise_if_any(folder, len(wanted), files)
        differences: list[str] = []
        # twins may be of ranks whose launcher was killed, which nobody here has counted
        if expected is not None:
            differences = totals.differences(expected)
            if differences:
                differences = (totals + left_out).differences(expected)
        if differences and STEP not in table_schema.names:
            raise IncompleteScores(
                f"{folder}: the merged table and the ranks' own sums differ:"
                f" {'; '.join(differences)}"
            )
    if left_out.counts[0]:
        print(f"scores: {left_out.counts[0]:,} rows stood there twice, the same: each taken once")
    record = {
        "key": key,
        "rows": int(totals.counts[0]),
        "status": totals.status(),
        "columns": table_schema.names,
    }
    record |= {
        "id_sum": int(totals.counts[1]),
        "sums": dict(zip(totals.columns, totals.sums.tolist(), strict=True)),
    }
    publish_json(folder / "manifest.json", {**record, **manifest, "starts": list(starts.values())})
    return totals


def _ranges(
    folder: Path, files: list[Path], wanted: np.ndarray, range_rows: int
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """(expected ids, rows of the parts with ids in that range) for each range, ascending; together
    every row of every part.
    """
    count = max(1, -(-len(wanted) // range_rows))
    if count == 1:
        yield (wanted, pa.concat_tables([_rows(file) for file in files]))
        return
    cuts = wanted[range_rows::range_rows]  # the first id of every range but the first
    spill = folder / ".merging"
    shutil.rmtree(spill, ignore_errors=True)
    spill.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            writers: dict[int, pa.RecordBatchFileWriter] = {}
            for batch in _gathered(files, range_rows):
                place = np.searchsorted(cuts, batch["sample_id"].to_numpy(), side="right")
                order = np.argsort(place, kind="stable")
                batch, place = batch.take(order), place[order]
                for number in np.unique(place).tolist():
                    low, high = np.searchsorted(place, [number, number + 1])
                    if number not in writers:
                        sink = stack.enter_context(pa.OSFile(str(spill / str(number)), "wb"))
                        writers[number] = stack.enter_context(pa.ipc.new_file(sink, batch.schema))
                    writers[number].write_table(batch.slice(low, high - low))
            empty = batch.slice(0, 0)
        for number in range(count):
            file, table = spill / str(number), empty
            if number in writers:
                with pa.memory_map(str(file)) as source:
                    table = pa.ipc.open_file(source).read_all()
            yield wanted[number * range_rows : (number + 1) * range_rows], table
            file.unlink(missing_ok=True)
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def _merged_schema(part: Path) -> pa.Schema:
    whole = pq.read_schema(part).remove_metadata()
    return pa.schema([field for field in whole if field.name != TOKEN_LOSSES])


def _rows(file: Path) -> pa.Table:
    table = pq.read_table(file, columns=_merged_schema(file).names, page_checksum_verification=True)
    return table.replace_schema_metadata(None)


def _gathered(files: Iterable[Path], rows: int) -> Iterator[pa.Table]:
    """The files' tables, small ones put together up to about `rows`."""
    held: list[pa.Table] = []
    for file in files:
        held.append(_rows(file))
        if sum(table.num_rows for table in held) >= rows:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _sorted(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(rows by id, rows that were the same as the one before them); of steps, the earliest rows."""
    ids = table["sample_id"].to_numpy()
    if STEP not in table.column_names:
        table = table.take(np.argsort(ids, kind="stable"))
        twin = _equals_the_row_before(table)
        return (table.filter(~twin), table.filter(twin)) if twin.any() else (table, table[:0])
    order = np.lexsort([table[STEP].to_numpy(), ids])
    first = np.ones(len(order), bool)
    first[1:] = np.diff(ids[order]) != 0
    return table.take(order[first]), table[:0]


def _equals_the_row_before(table: pa.Table) -> np.ndarray:
    """bool [rows]: the same in every column, to the bit, as the row before it."""
    ids = table["sample_id"].to_numpy()
    again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
    same = np.ones(len(again), bool)
    for column in table.columns if len(again) else ():
        now, before = (_bits(column.take(rows)) for rows in (again, again - 1))
        same &= now == before
    twin = np.zeros(len(ids), bool)
    twin[again[same]] = True
    return twin


def _bits(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = column.to_numpy()
    # a value that is not finite is the same as itself
    return values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values


@dataclass
class _Problems:
    """What keeps the table from being the pool: how many ids, and the first few."""

    found: dict[str, tuple[int, list[int]]] = field(
        default_factory=lambda: dict.fromkeys(("missing", "unknown", "doubled"), (0, []))
    )

    def look(self, wanted: np.ndarray, ids: np.ndarray) -> None:
        """`wanted` and `ids` of one range, both ascending."""
        if np.array_equal(wanted, ids):
            return
        unique, counts = np.unique(ids, return_counts=True)
        for name, wrong in (
            ("missing", np.setdiff1d(wanted, unique)),
            ("unknown", np.setdiff1d(unique, wanted)),
            ("doubled", unique[counts > 1]),
        ):
            count, shown = self.found[name]
            self.found[name] = count + len(wrong), [*shown, *wrong[: SHOWN - len(shown)].tolist()]

    def raise_if_any(self, folder: Path, wanted: int, files: list[Path]) -> None:
        if not any(count for count, _ in self.found.values()):
            return
        text = ", ".join(f"{name} {count} {shown}" for name, (count, shown) in self.found.items())
        doubled = self.found["doubled"][1]
        holders = [
            file.name
            for file in (files if doubled else ())
            if np.isin(doubled, pq.read_table(file, columns=["sample_id"])["sample_id"]).any()
        ]
        named = f"; rows that differ in {', '.join(holders)}: remove one" if holders else ""
        raise IncompleteScores(
            f"{folder}: wanted every one of {wanted} samples exactly once; {text}{named}; score"
            " again"
        )
