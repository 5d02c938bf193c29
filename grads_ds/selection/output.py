"""A choice in the forms people use: an order of the rows, Arrow tables, terminal text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from grads_ds.selection.choose import Choice
from grads_ds.selection.numbers import random_keys
from grads_ds.statistics import Ints

# bytes of JSON beyond which rows stay texts: columns would have to fit memory
COLUMNS_LARGEST = 512 * 2**20


def ordered(choice: Choice, order: str, seed: int) -> Ints:
    """The chosen rows in the order of selected.jsonl."""
    chosen = choice.chosen
    if order == "signal":
        return chosen[np.lexsort((choice.sample_id[chosen], -choice.signal[chosen]))]
    if order == "shuffled":
        return chosen[
            np.argsort(random_keys(choice.sample_id[chosen], seed, purpose=3), kind="stable")
        ]
    return np.sort(chosen) if order == "pool" else chosen


def to_arrow(choice: Choice) -> pa.Table:
    """selection.parquet as a table. Null: no signal, density or rank exists."""
    codes = pa.array(choice.reason.astype(np.int32))
    return pa.table(
        {
            "sample_id": pa.array(choice.sample_id),
            "signal": pa.array(choice.signal, from_pandas=True),
            "density": pa.array(choice.density, from_pandas=True),
            "selected": pa.array(choice.selected),
            "rank": pa.array(choice.rank, mask=choice.rank == 0),
            "reason": pa.DictionaryArray.from_arrays(codes, pa.array(choice.reasons)),
            "weight": pa.array(choice.weight),
        }
    )


def write_choice(choice: Choice, to: Path) -> None:
    """selection.parquet: plain strings for readers (no Arrow schema), a dictionary on disk for the
    reasons alone.
    """
    options = {"store_schema": False, "use_dictionary": ["reason"]}
    pq.write_table(to_arrow(choice), to, write_page_checksum=True, **options)


def write_dataset(jsonl: Path, choice: Choice, order: Ints, to: Path) -> None:
    """The chosen rows with their scores (grads_ columns) as one parquet file, which `datasets`
    loads.

    The user's fields become columns; rows that have no common schema, or are too many, stay JSON in
    `row`.
    """
    table = _columns(jsonl, len(order))
    scores = {
        "sample_id": choice.sample_id,
        "signal": choice.signal,
        "density": choice.density,
        "rank": choice.rank,
        "weight": choice.weight,
    }
    if table is not None:
        for name, values in scores.items():
            table = table.append_column(f"grads_{name}", pa.array(values[order], from_pandas=True))
        pq.write_table(table, to, write_page_checksum=True)
        return
    schema = pa.schema(
        [("row", pa.string())]
        + [(f"grads_{name}", pa.from_numpy_dtype(values.dtype)) for name, values in scores.items()]
    )
    with (
        jsonl.open(encoding="utf-8", newline="\n") as file,
        pq.ParquetWriter(to, schema, write_page_checksum=True) as writer,
    ):
        for start in range(0, len(order), 65536):
            part = order[start : start + 65536]
            rows = [file.readline().rstrip("\n") for _ in part]
            columns = [pa.array(values[part], from_pandas=True) for values in scores.values()]
            writer.write_table(pa.table([pa.array(rows, pa.string()), *columns], schema=schema))


def _columns(jsonl: Path, count: int) -> pa.Table | None:
    if jsonl.stat().st_size > COLUMNS_LARGEST:
        return None
    try:
        # texts that look like dates stay texts
        table = pa.json.read_json(
            jsonl,
            read_options=pa.json.ReadOptions(block_size=max(1, min(jsonl.stat().st_size, 2**30))),
            parse_options=pa.json.ParseOptions(newlines_in_values=False),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    if table.num_rows != count or any(_dated(field.type) for field in table.schema):
        return None
    return table


def _dated(kind: pa.DataType) -> bool:
    """Whether a type holds a timestamp, which JSON never said: the columns would differ from the
    rows.
    """
    if pa.types.is_nested(kind):
        return any(_dated(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_timestamp(kind))


def to_text(name: str, report: dict[str, Any]) -> str:
    """A choice's report as lines for a terminal."""
    counts, budget, edge = report["counts"], report["budget"], report["thresholds"]
    lines = [
        f"{name}: method {report['method']}, {budget['rule']}",
        f"  chosen     {counts['selected']} of {counts['pool']} samples"
        f" ({budget['fraction_of_pool']:.2%})"
        + (f", {budget['tokens']} tokens" if budget["tokens"] is not None else ""),
        f"  signal     {_short(edge['signal_min'])} to {_short(edge['signal_max'])}; pool "
        + ", ".join(
            f"{mark}: {_short(value)}" for mark, value in report["signal_quantiles"].items()
        ),
        f"  threshold  preference {_short(edge['preference'])}"
        + (f", bandwidth {_short(report['bandwidth'])}" if report["bandwidth"] else ""),
    ]
    if report["region"]:
        lines.append(
            "  region     "
            + ", ".join(f"{low:.4g} to {high:.4g}" for low, high in report["region"])
        )
    random = report["versus_random"]
    lines.append(
        f"  random     {random['overlap']} samples in common with random at this size "
        f"(by chance {random['expected_by_chance']:g})"
    )
    if report["length"]:
        length = report["length"]
        lines.append(
            "  length     rank correlation of signal and target tokens "
            f"{_short(length['spearman_signal_length'])}; "
            f"mean tokens {length['mean_target_tokens_selected']:g} chosen, "
            f"{length['mean_target_tokens_pool']:g} pool"
        )
    for field, values in report["composition"].items():
        shown = [f"{word} {entry['kept'] or 0:.1%}" for word, entry in list(values.items())[:8]]
        lines.append(
            f"  kept by {field}: " + ", ".join(shown) + (" ..." if len(values) > 8 else "")
        )
    lines += [f"  warning    {text}" for text in report["warnings"]]
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
