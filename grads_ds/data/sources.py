"""Where rows come from: a file, a folder of files, or a hub data set, read in an order that never
depends on the disk.

Reads .json (an array, one object, or lines), .jsonl, .csv, .tsv, .parquet, .arrow and .txt, also
gzipped (.gz, text kinds), folders of these, folders written by `datasets.save_to_disk`, and hub ids
(`owner/name`, `owner/name:split`, `owner/name:config:split`). Yields `RawRow`s: the row as given,
with its origin `file:line`. Writes nothing; faults are collected, not raised one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.data.problems import Faults
from grads_ds.data.readers import HUB_ID, READERS, Input

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_GZIPPED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
# `datasets`' own bookkeeping
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(?:[-_.]?(?:part|shard|data)?[-_.]?\d{3,}(?:-of-\d+)?)$")


Found = tuple[str, str, tuple[str, str]]  # kind, path, (short name, name with its folder)


@dataclass(frozen=True)
class RawRow:
    """One row as the user gave it.

    `origin` is `file:line` (of parquet and arrow: `file:row`, from 1).
    """

    source: str
    origin: str
    file: str
    row: dict[str, Any]


def find_inputs(entries: Sequence[str], faults: Faults) -> list[Input]:
    """Expand the configured entries into inputs, each with a source name that is unique to its
    entry and file stem.
    """
    found: list[Found] = []
    seen: set[str] = set()
    for entry in entries:
        path = Path(entry).expanduser()
        if entry in seen:
            faults.add(entry, "each source once", "it twice", "remove one of the two")
            continue
        seen.add(entry)
        if path.is_dir():
            found += _folder(path, faults)
        elif path.exists() and not path.is_file():
            faults.add(entry, "a file or a folder", "a pipe, a socket or a device", "save it first")
        elif path.exists():
            if not _suffix(path):
                faults.add(
                    entry,
                    f"a file of kind {', '.join(SUFFIXES)}",
                    repr(path.suffix),
                    "convert or rename it",
                )
            else:
                found.append((_suffix(path), str(path), _names(path)))
        elif (hub := HUB_ID.fullmatch(entry)) and not _suffix(path):
            name = hub.group(1)
            found.append(("hub", entry, (name.rpartition("/")[2], name)))
        else:
            faults.add(
                entry,
                "a file, a folder or a hub id (owner/name)",
                "nothing there",
                "give an existing path",
            )
    return _unique(found)


def read(item: Input, faults: Faults) -> Iterator[RawRow]:
    """Yield the rows of one input.

    Faults are added to `faults`; what can still be read is yielded.
    """
    before, rows = faults.count, 0
    for number, row in READERS[item.kind](item, faults):
        rows += 1
        origin = f"{item.path}:{number}"
        if not isinstance(row, dict):
            faults.add(
                origin, "an object with named fields", _kind(row), "make it one object per row"
            )
            continue
        yield RawRow(item.source, origin, item.path, row)
    if not rows and faults.count == before:
        faults.add(
            item.path,
            "at least one row",
            "none (the file is empty)",
            "remove it from the config or fill it",
        )


# ---- expanding entries ---------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(".gz") and Path(name[:-3]).suffix in _GZIPPED:
        return Path(name[:-3]).suffix
    return Path(name).suffix if Path(name).suffix in SUFFIXES else ""


def _names(path: Path) -> tuple[str, str]:
    """Source names of a file, short and with its folder: its stem without a shard number."""
    stem = path.name[: path.name.lower().index(_suffix(path))] if _suffix(path) else path.name
    stem = _SHARD.sub("", stem) or path.resolve().parent.name
    parent = path.resolve().parent.name
    return stem, f"{parent}/{stem}"


def _folder(path: Path, faults: Faults) -> list[Found]:
    name = path.resolve().name
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [("saved", str(path), (name, f"{path.resolve().parent.name}/{name}"))]
    # sorted by the parts of the relative path: the same on every file system
    files = sorted(
        (
            file
            for file in path.rglob("*")
            if file.is_file() and _suffix(file) and file.name not in _NOT_ROWS
        ),
        key=lambda file: file.relative_to(path).parts,
    )
    files = [
        file
        for file in files
        if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    ]
    if not files:
        faults.add(
            str(path),
            f"a folder with files of kind {', '.join(SUFFIXES)}",
            "none",
            "give another folder",
        )
    return [(_suffix(file), str(file), _names(file)) for file in files]


def _unique(found: list[Found]) -> list[Input]:
    """Shortest names that keep files of different folders apart; shards of one folder share their
    name.
    """
    longer: dict[str, dict[str, set[str]]] = {}  # short name -> name with folder -> whole folders
    for _, path, (short, with_folder) in found:
        longer.setdefault(short, {}).setdefault(with_folder, set()).add(
            str(Path(path).resolve().parent)
        )
    inputs = []
    for kind, path, (short, with_folder) in found:
        if len(longer[short]) == 1 and len(longer[short][with_folder]) == 1:
            name = short
        elif len(longer[short][with_folder]) == 1:
            name = with_folder
        else:
            name = f"{Path(path).parent}/{short}"
        inputs.append(Input(kind, path, name))
    return inputs


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true/false",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
