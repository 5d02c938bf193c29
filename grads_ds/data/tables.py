"""Rows of tables: csv, parquet, arrow, folders of `datasets.save_to_disk` and hub data sets.

Each function yields (line or row number from 1, row). Arrow gives every struct the fields of all
rows, null where a row has none; such nulls are taken out again at every depth, as the row had no
such field. Reads what `sources` found; writes nothing; problems are collected.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator
from typing import Any

from grads_ds.data import input_files
from grads_ds.data.input_files import Input, lines
from grads_ds.data.problems import Problems
from grads_ds.run_dir.storage import raise_if_storage

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?(?::([\w.-]+))?")
# objects that may well be empty; another one of nulls alone was never there
_MAY_BE_EMPTY = ("arguments", "parameters", "properties")


def without_padding(value: Any) -> Any:
    """The value without the null fields of its structs, and with Arrow's maps as objects."""
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            plain = without_padding(item)
            padding = plain == {} and item and key not in _MAY_BE_EMPTY
            if plain is not None and not padding:
                kept[key] = plain
        return kept
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):
            return {str(key): without_padding(item) for key, item in value}
        return [without_padding(item) for item in value]
    return value


def csv_rows(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(input_files.LINE_LARGEST)
    reader = csv.DictReader(
        (line for _, line in lines(item, problems)), delimiter="\t" if item.kind == ".tsv" else ","
    )
    begins = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                width = len(reader.fieldnames or [])
                problems.add(
                    f"{item.path}:{begins}",
                    f"{width} fields, as in the header",
                    "another number",
                    "quote or complete it",
                )
            else:
                yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        problems.add(f"{item.path}:{reader.line_num}", "valid CSV", str(error), "correct that line")


def parquet_rows(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(item.path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_padding(row)
    except (pa.ArrowException, OSError) as error:
        raise_if_storage(error)
        problems.add(item.path, "a parquet file", str(error).split("\n")[0], "write the file again")


def arrow_rows(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(item.path) as file:
            try:
                reader = iter(pa.ipc.open_stream(file))
            except pa.ArrowInvalid:
                whole = pa.ipc.open_file(file)
                reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
            for batch in reader:
                for row in batch.to_pylist():
                    number += 1
                    yield number, without_padding(row)
    except (pa.ArrowException, OSError) as error:
        raise_if_storage(error)
        problems.add(
            item.path,
            "an arrow file (stream or file format)",
            str(error).split("\n")[0],
            "write the file again",
        )


def saved_rows(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(item.path)
    # whatever a damaged folder makes the library raise is the user's folder's problem
    except Exception as error:
        raise_if_storage(error)
        problems.add(
            item.path,
            "a folder written by datasets.save_to_disk",
            str(error).split("\n")[0],
            "save it again",
        )
        return
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            problems.add(
                item.path,
                "a split named train",
                f"{', '.join(data)}",
                "give the folder of one split",
            )
            return
        if others := [name for name in data if name != "train"]:
            problems.note(f"{item.path}: not read: {', '.join(others)} (only train is read)")
        data = data["train"]
    yield from ((number, without_padding(row)) for number, row in enumerate(data, start=1))


def hub_rows(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    import datasets

    name, first, second = HUB_ID.fullmatch(item.path).groups()  # type: ignore[union-attr]
    config, split = (first, second) if second else (None, first or "train")
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # five retries are not the user's news; the outcome is
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # network, permission, builder and name errors come in every class
        reason = str(error).strip().split("\n")[0][:300]
        problems.add(
            item.path,
            "a file or folder here, or a hub data set",
            f"neither here nor could it be fetched ({type(error).__name__}: {reason})",
            "give an existing path, or check the id and the network",
        )
        return
    finally:
        log.setLevel(level)
    yield from ((number, without_padding(row)) for number, row in enumerate(data, start=1))
