"""How each kind of input is read: one function per kind, yielding (line or row number from 1, row
as given).

Reads the files and data sets that `sources` found; writes nothing. What cannot be read is added to
the faults with its file and line, and reading goes on with the next row where that makes sense.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from grads_ds.data.problems import Faults

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class Input:
    """One thing to read: a file (`kind` is its suffix), a saved data set folder ("saved") or a hub
    data set ("hub").
    """

    kind: str
    path: str
    source: str


LINE_LARGEST = 64 * 2**20  # bytes; the longest real documents have a few


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(item: Input, faults: Faults) -> Iterator[tuple[int, str]]:
    """Decoded lines; split at newlines alone (str.splitlines would also split at U+2028, which JSON
    strings may hold).
    """
    try:
        with _open(item.path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LARGEST + 1), b""), 1):
                if len(line) > LINE_LARGEST:
                    wanted, found = f"lines of at most {LINE_LARGEST:,} bytes", "a longer one"
                    faults.add(f"{item.path}:{number}", wanted, found, "split it or leave it out")
                    return
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                    faults.add(
                        f"{item.path}:{number}", "UTF-8 text", where, "save the file as UTF-8"
                    )
    except (OSError, EOFError) as error:
        faults.add(item.path, "a readable file", str(error), "mend or replace it")


def _broken(where: str, error: json.JSONDecodeError, faults: Faults) -> None:
    faults.add(where, "valid JSON", f"{error.msg} at column {error.colno}", "mend that line")


def _json_lines(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(item, faults):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _json(item, faults)
            return
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            _broken(f"{item.path}:{number}", error, faults)


def _json(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    before = faults.count
    text = "".join(line for _, line in _lines(item, faults))
    if faults.count > before:
        return
    start = text.lstrip()[:1]
    if start == "[":
        yield from _json_array(item, text, faults)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if not first:
            return
        if _parses(first):
            yield from _json_lines(item, faults)
        else:
            _broken(f"{item.path}:{error.lineno}", error, faults)
        return
    tables = (
        [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if isinstance(value, dict)
        else []
    )
    if isinstance(value, dict) and len(value) == 1 and tables:  # {"data": [...]}
        key = next(iter(value))
        yield from _json_array(
            item, text, faults, after=text.index("[", text.index(json.dumps(key)[1:-1]))
        )
    else:
        yield 1, value


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_array(
    item: Input, text: str, faults: Faults, after: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Elements of the array that opens at `after`, each with the line it starts on."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    at = blank.match(text, (text.index("[") if after is None else after) + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    try:
        while text[at : at + 1] != "]":
            value, end = decoder.raw_decode(text, at)
            line, counted = line + text.count("\n", counted, at), at
            yield line, value
            at = blank.match(text, end).end()  # type: ignore[union-attr]
            if text[at : at + 1] == ",":
                at = blank.match(text, at + 1).end()  # type: ignore[union-attr]
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    except json.JSONDecodeError as error:
        _broken(f"{item.path}:{error.lineno}", error, faults)


def _csv(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(
        (line for _, line in _lines(item, faults)), delimiter="\t" if item.kind == ".tsv" else ","
    )
    begins = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                width = len(reader.fieldnames or [])
                faults.add(
                    f"{item.path}:{begins}",
                    f"{width} fields, as in the header",
                    "another number",
                    "quote or complete it",
                )
            else:
                yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        faults.add(f"{item.path}:{reader.line_num}", "valid CSV", str(error), "mend that line")


def _paragraphs(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    begins, kept = 0, []  # type: tuple[int, list[str]]
    for number, line in _lines(item, faults):
        if line.strip():
            begins = begins if kept else number
            kept.append(line.rstrip("\r\n"))
        elif kept:
            yield begins, {"text": "\n".join(kept)}
            kept = []
    if kept:
        yield begins, {"text": "\n".join(kept)}


def _parquet(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(item.path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        faults.add(item.path, "a parquet file", str(error).split("\n")[0], "write the file again")


def _arrow(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
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
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        faults.add(
            item.path,
            "an arrow file (stream or file format)",
            str(error).split("\n")[0],
            "write the file again",
        )


def _saved(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(item.path)
    # whatever a damaged folder makes the library raise is the user's folder's fault
    except Exception as error:
        faults.add(
            item.path,
            "a folder written by datasets.save_to_disk",
            str(error).split("\n")[0],
            "save it again",
        )
        return
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            faults.add(
                item.path,
                "a split named train",
                f"{', '.join(data)}",
                "give the folder of one split",
            )
            return
        data = data["train"]
    yield from enumerate(data, start=1)


def _hub(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
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
        faults.add(
            item.path,
            "a file or folder here, or a hub data set",
            f"neither here nor could it be fetched ({type(error).__name__}: {reason})",
            "give an existing path, or check the id and the network",
        )
        return
    finally:
        log.setLevel(level)
    yield from enumerate(data, start=1)


READERS: dict[str, Callable[[Input, Faults], Iterator[tuple[int, Any]]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _paragraphs,
    ".parquet": _parquet,
    ".arrow": _arrow,
    "saved": _saved,
    "hub": _hub,
}
