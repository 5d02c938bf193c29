"""Where rows come from: a file, a folder of files, or a hub data set, read in an order that never depends on the disk.

Reads .json (an array, one object, or lines), .jsonl, .csv, .tsv, .parquet, .arrow and .txt, also gzipped (.gz, text kinds), folders
of these, folders written by `datasets.save_to_disk`, and hub ids (`owner/name`, `owner/name:split`, `owner/name:config:split`).
Yields `RawRow`s: the row as given, with its origin `file:line`. Writes nothing; faults are collected, not raised one by one.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from grads_ds.config import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_GZIPPED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # `datasets`' own bookkeeping
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?(?::([\w.-]+))?")
_SHARD = re.compile(r"(?:[-_.]?(?:part|shard|data)?[-_.]?\d{3,}(?:-of-\d+)?)$")
SHOWN = 20  # faults printed in full; the rest are counted


@dataclass(frozen=True)
class RawRow:
    """One row as the user gave it. `origin` is `file:line` (of parquet and arrow: `file:row`, from 1)."""

    source: str
    origin: str
    file: str
    row: dict[str, Any]


@dataclass
class Faults:
    """Everything found wrong, in the order found; `raise_if_any` turns it into one UserError."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, wanted: str, found: str, change: str) -> None:
        """Note one fault. Only the first SHOWN keep their text."""
        self.add_text(f"{where}: wanted {wanted}; found {found}; {change}")

    def add_text(self, text: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(text)

    def raise_if_any(self) -> None:
        """Raise UserError with the faults shown and the number of those left out."""
        if self.count:
            more = self.count - len(self.shown)
            raise UserError(self.shown + ([f"... and {more:,} more of this kind or another"] if more else []))


@dataclass(frozen=True)
class Input:
    """One thing to read: a file (`kind` is its suffix), a saved data set folder ("saved") or a hub data set ("hub")."""

    kind: str
    path: str
    source: str


def find_inputs(entries: Sequence[str], faults: Faults) -> list[Input]:
    """Expand the configured entries into inputs, each with a source name that is unique to its entry and file stem."""
    found: list[tuple[str, str, list[str]]] = []  # kind, path, candidate names from short to long
    seen: set[str] = set()
    for entry in entries:
        path = Path(entry).expanduser()
        if entry in seen:
            faults.add(entry, "each source once", "it twice", "remove one of the two")
            continue
        seen.add(entry)
        if path.is_dir():
            found += _folder(path, faults)
        elif path.exists():
            if not _suffix(path):
                faults.add(entry, f"a file of kind {', '.join(SUFFIXES)}", repr(path.suffix), "convert or rename it")
            else:
                found.append((_suffix(path), str(path), _names(path)))
        elif (hub := _HUB_ID.fullmatch(entry)) and not _suffix(path):
            name = hub.group(1)
            found.append(("hub", entry, [name.rpartition("/")[2], name, entry]))
        else:
            faults.add(entry, "a file, a folder or a hub id (owner/name)", "nothing there", "give an existing path")
    return _unique(found)


def read(item: Input, faults: Faults) -> Iterator[RawRow]:
    """Yield the rows of one input. Faults are added to `faults`; what can still be read is yielded."""
    before, rows = faults.count, 0
    for number, row in _READERS[item.kind](item, faults):
        rows += 1
        origin = f"{item.path}:{number}"
        if not isinstance(row, dict):
            faults.add(origin, "an object with named fields", _kind(row), "make it one object per row")
            continue
        yield RawRow(item.source, origin, item.path, row)
    if not rows and faults.count == before:
        faults.add(item.path, "at least one row", "none (the file is empty)", "remove it from the config or fill it")


# ---- expanding entries ----------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(".gz") and Path(name[:-3]).suffix in _GZIPPED:
        return Path(name[:-3]).suffix
    return Path(name).suffix if Path(name).suffix in SUFFIXES else ""


def _names(path: Path) -> list[str]:
    stem = path.name[: path.name.lower().index(_suffix(path))] if _suffix(path) else path.name
    stem = _SHARD.sub("", stem) or path.resolve().parent.name
    parent = path.resolve().parent.name
    return [stem, f"{parent}/{stem}", str(path)]


def _folder(path: Path, faults: Faults) -> list[tuple[str, str, list[str]]]:
    name = path.resolve().name
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [("saved", str(path), [name, f"{path.resolve().parent.name}/{name}", str(path)])]
    # sorted by the parts of the relative path: the same on every file system
    files = sorted(
        (file for file in path.rglob("*") if file.is_file() and _suffix(file) and file.name not in _NOT_ROWS),
        key=lambda file: file.relative_to(path).parts,
    )
    files = [file for file in files if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)]
    if not files:
        faults.add(str(path), f"a folder with files of kind {', '.join(SUFFIXES)}", "none", "give another folder")
    return [(_suffix(file), str(file), _names(file)) for file in files]


def _unique(found: list[tuple[str, str, list[str]]]) -> list[Input]:
    """Shortest names that keep files of different folders apart; shards of one folder share their name."""
    owners: dict[str, set[str]] = {}
    for _, path, names in found:
        owners.setdefault(names[0], set()).add(names[1])
    inputs = []
    for kind, path, names in found:
        long_names = {n[1] for _, _, n in found if n[0] == names[0]}
        name = names[0] if len(long_names) == 1 else names[1]
        inputs.append(Input(kind, path, name))
    return inputs


# ---- readers: each yields (line or row number from 1, row) -----------------------------------------------------------


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _lines(item: Input, faults: Faults) -> Iterator[tuple[int, str]]:
    """Decoded lines; split at newlines alone (str.splitlines would also split at U+2028, which JSON strings may hold)."""
    try:
        with _open(item.path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                    faults.add(f"{item.path}:{number}", "UTF-8 text", where, "save the file as UTF-8")
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
    tables = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)] if isinstance(value, dict) else []
    if isinstance(value, dict) and len(value) == 1 and tables:  # {"data": [...]}
        key = next(iter(value))
        yield from _json_array(item, text, faults, after=text.index("[", text.index(json.dumps(key)[1:-1])))
    else:
        yield 1, value


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_array(item: Input, text: str, faults: Faults, after: int | None = None) -> Iterator[tuple[int, Any]]:
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
    reader = csv.DictReader((line for _, line in _lines(item, faults)), delimiter="\t" if item.kind == ".tsv" else ",")
    begins = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                width = len(reader.fieldnames or [])
                faults.add(f"{item.path}:{begins}", f"{width} fields, as in the header", "another number", "quote or complete it")
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
        faults.add(item.path, "an arrow file (stream or file format)", str(error).split("\n")[0], "write the file again")


def _saved(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(item.path)
    except Exception as error:  # whatever a damaged folder makes the library raise is the user's folder's fault
        faults.add(item.path, "a folder written by datasets.save_to_disk", str(error).split("\n")[0], "save it again")
        return
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            faults.add(item.path, "a split named train", f"{', '.join(data)}", "give the folder of one split")
            return
        data = data["train"]
    yield from enumerate(data, start=1)


def _hub(item: Input, faults: Faults) -> Iterator[tuple[int, Any]]:
    import datasets

    name, first, second = _HUB_ID.fullmatch(item.path).groups()  # type: ignore[union-attr]
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


_READERS = {
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
