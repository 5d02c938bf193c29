"""The prepared pool read with pyarrow alone: source, metadata and the user's own rows, without
tokens, without torch.

A folder written by `datasets.save_to_disk` holds state.json and Arrow streams; they are mapped, not
loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from grads_ds.config.errors import UserError
from grads_ds.statistics import Ints

COMPOSITION_VALUES = 50  # a field with more distinct values is cut to its commonest
BATCH = 8192


@dataclass(frozen=True)
class Pool:
    """Columns of the prepared pool, still on disk, and the ids of its rows."""

    table: pa.Table
    sample_id: Ints

    def positions(self, sample_id: Ints) -> Ints:
        """Where these samples stand in the pool. Raises UserError when one is not there."""
        if np.array_equal(self.sample_id, sample_id):
            return np.arange(len(sample_id))
        order = np.argsort(self.sample_id, kind="stable")
        found = np.minimum(np.searchsorted(self.sample_id, sample_id, sorter=order), len(order) - 1)
        place = order[found]
        missing = np.flatnonzero(self.sample_id[place] != sample_id)
        if len(missing):
            raise UserError(
                f"select: wanted every scored sample in the prepared pool; found {len(missing)}"
                f" missing, the first sample_id {sample_id[missing[0]]}; the pool was prepared"
                " anew: run the probe again"
            )
        return np.asarray(place, dtype=np.int64)

    def rows(self, positions: Ints) -> Iterator[str]:
        """The user's rows (JSON) at these positions, in their order."""
        read = self.row_reader(positions)
        for start in range(0, len(positions), BATCH):
            texts = [""] * len(positions[start : start + BATCH])
            # as the file goes
            for i in np.argsort(positions[start : start + BATCH], kind="stable").tolist():
                texts[i] = read(start + i)
            yield from texts

    def row_reader(self, positions: Ints, column: str = "row") -> Callable[[int], str]:
        """A function of i: the user's row (JSON), or another text column, at positions[i]; an
        absent text is empty.
        """
        # pyarrow's take (26.0) first copies the whole column into one array, which fails beyond 2
        # GB of text
        chunks = self.table[column].chunks
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        of = np.searchsorted(starts, positions, side="right") - 1

        def read(i: int) -> str:
            return str(chunks[of[i]][int(positions[i] - starts[of[i]])].as_py() or "")

        return read

    def fields(self) -> dict[str, tuple[NDArray[np.int64], list[str]]]:
        """Source and every metadata field, each as codes per row and the values they stand for."""
        found = {"source": _coded(self.table["source"])}
        if "metadata" in self.table.column_names:
            codes, texts = _coded(self.table["metadata"])
            objects = [json.loads(text) if text else {} for text in texts]
            for name in sorted({key for value in objects for key in value}):
                words = [_word(value.get(name)) for value in objects]
                values = sorted(set(words))
                index = {word: i for i, word in enumerate(values)}
                found[name] = (
                    np.array([index[word] for word in words], dtype=np.int64)[codes],
                    values,
                )
        return found


def read_pool(folder: Path) -> Pool:
    """Map the folder's Arrow files. Raises UserError when it is not a prepared pool."""
    table = _read(folder, ("sample_id", "source", "row", "metadata"), ("metadata",))
    return Pool(table, np.asarray(table["sample_id"].to_numpy(), dtype=np.int64))


def _read(folder: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    try:
        names = [
            item["filename"]
            for item in json.loads((folder / "state.json").read_text())["_data_files"]
        ]
        table = pa.concat_tables([_stream(folder / name, columns) for name in names])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError) as error:
        raise UserError(
            f"select: wanted the prepared pool at {folder}; found none that can be read ({error});"
            " run prepare first"
        ) from None
    lacking = [name for name in columns if name not in (*table.column_names, *optional)]
    if lacking:
        raise UserError(
            f"select: wanted columns {', '.join(lacking)} in {folder}; found "
            f"{', '.join(table.column_names)}; prepare again"
        )
    return table


def composition(
    fields: dict[str, tuple[NDArray[np.int64], list[str]]], selected: NDArray[np.bool_]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per field and value: samples in the pool and among the chosen, the share of each, and the
    share kept.

    `selected`: per pool row. The rarest values beyond the first fifty are summed under "(other)".
    """
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    total, chosen = len(selected), max(1, int(np.count_nonzero(selected)))
    for name, (codes, values) in fields.items():
        pool = np.bincount(codes, minlength=len(values))
        kept = np.bincount(codes[selected], minlength=len(values))
        order = sorted(range(len(values)), key=lambda i: (-int(pool[i]), values[i]))
        entries = [(values[i], int(pool[i]), int(kept[i])) for i in order[:COMPOSITION_VALUES]]
        rest = order[COMPOSITION_VALUES:]
        if rest:
            entries.append(("(other)", int(pool[rest].sum()), int(kept[rest].sum())))
        tables[name] = {word: _shares(p, total, k, chosen) for word, p, k in entries}
    return tables


def _shares(pool: int, total: int, kept: int, chosen: int) -> dict[str, Any]:
    return {
        "pool": pool,
        "selected": kept,
        "share_of_pool": round(pool / total, 6),
        "share_of_selected": round(kept / chosen, 6),
        "kept": round(kept / pool, 6) if pool else None,
    }


def read_tokens(folder: Path, sample_ids: Collection[int]) -> dict[int, tuple[Ints, Ints]]:
    """(input_ids, labels), int64 [T] each, of these samples of a prepared pool, by id.

    Raises UserError when it is not a prepared pool.
    """
    table = _read(folder, ("sample_id", "input_ids", "labels"))
    rows = np.flatnonzero(
        np.isin(table["sample_id"].to_numpy(), np.array(list(sample_ids), dtype=np.int64))
    )
    ids = table["sample_id"].to_numpy()
    found = {}
    for row in rows.tolist():
        tokens, labels = (
            np.asarray(table[name][row].values.to_numpy(), dtype=np.int64)
            for name in ("input_ids", "labels")
        )
        found[int(ids[row])] = tokens, labels
    return found


def _stream(path: Path, names: Sequence[str]) -> pa.Table:
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        keep = [name for name in names if name in reader.schema.names]
        return pa.Table.from_batches(list(reader), schema=reader.schema).select(keep)


def _coded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    coded = pc.dictionary_encode(
        pc.fill_null(column.cast(pa.large_string()), "")
    ).unify_dictionaries()
    if coded.num_chunks == 0:
        return np.empty(0, dtype=np.int64), []
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in coded.chunks])
    return codes.astype(np.int64), [str(text) for text in coded.chunk(0).dictionary.to_pylist()]


def _word(value: Any) -> str:
    return (
        "(none)"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, sort_keys=True)
    )
