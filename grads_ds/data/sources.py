"""Where rows come from: a file, a folder of files, or a hub data set, read in an order that never
depends on the disk.

Reads .json (an array, one object, or lines), .jsonl, .csv, .tsv, .parquet, .arrow and .txt, also
packed (.gz, .bz2, .xz, .zst; text kinds), folders of these, folders written by
`datasets.save_to_disk`, and hub ids (`owner/name`, `owner/name:split`, `owner/name:config:split`).
Yields `RawRow`s: the row as given, with its origin `file:line`. Writes nothing; problems are
collected, not raised one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.data.folders import SUFFIXES, file_identity, files_of, suffix
from grads_ds.data.input_files import Input
from grads_ds.data.problems import Problems
from grads_ds.data.readers import READERS
from grads_ds.data.tables import HUB_ID

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


def find_inputs(entries: Sequence[str], problems: Problems) -> list[Input]:
    """Expand the configured entries into inputs, each with a source name that is unique to its
    entry and file stem.
    """
    found: list[Found] = []
    seen: dict[Any, str] = {}
    for entry in entries:
        path = Path(entry)
        mine: list[Found] = []
        if path.is_dir():
            mine = _folder(path, problems)
        elif path.exists() and not path.is_file():
            problems.add(
                entry, "a file or a folder", "a pipe, a socket or a device", "save it first"
            )
        elif path.exists():
            if not suffix(path):
                problems.add(
                    entry,
                    f"a file of kind {', '.join(SUFFIXES)}",
                    repr(path.suffix),
                    "convert or rename it",
                )
            else:
                mine = [(suffix(path), str(path), _names(path))]
        elif (hub := HUB_ID.fullmatch(entry)) and not suffix(path):
            name = hub.group(1)
            mine = [("hub", entry, (name.rpartition("/")[2], name))]
        else:
            problems.add(
                entry,
                "a file, a folder or a hub id (owner/name)",
                "nothing there",
                "give an existing path",
            )
        # the same rows under another spelling, a link, or a folder that holds the file
        for one in mine:
            first = seen.setdefault(_identity(one), one[1])
            if first == one[1] and one not in found:
                found.append(one)
            else:
                other = "it twice" if first == one[1] else f"it again as {one[1]}"
                problems.add(first, "each source once", other, "remove one of the two")
    return _unique(found)


def _identity(found: Found) -> Any:
    if found[0] != "hub":
        return file_identity(Path(found[1]))
    name, config, split = HUB_ID.fullmatch(found[1]).groups()  # type: ignore[union-attr]
    return (name, config, split) if split else (name, None, config or "train")


def read(item: Input, problems: Problems) -> Iterator[RawRow]:
    """Yield the rows of one input.

    Problems are added to `problems`; what can still be read is yielded.
    """
    before, rows = problems.count, 0
    for number, row in READERS[item.kind](item, problems):
        rows += 1
        origin = f"{item.path}:{number}"
        if not isinstance(row, dict):
            problems.add(
                origin, "an object with named fields", _kind(row), "make it one object per row"
            )
            continue
        yield RawRow(item.source, origin, item.path, row)
    if not rows and problems.count == before:
        problems.add(
            item.path,
            "at least one row",
            "none (the file is empty)",
            "remove it from the config or fill it",
        )


# ---- expanding entries ---------------------------------------------------------------------------


def _names(path: Path) -> tuple[str, str]:
    """Source names of a file, short and with its folder: its stem without a shard number."""
    stem = path.name[: path.name.lower().index(suffix(path))] if suffix(path) else path.name
    stem = _SHARD.sub("", stem) or path.resolve().parent.name
    parent = path.resolve().parent.name
    return stem, f"{parent}/{stem}"


def _folder(path: Path, problems: Problems) -> list[Found]:
    name = path.resolve().name
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [("saved", str(path), (name, f"{path.resolve().parent.name}/{name}"))]
    files = files_of(path, problems)
    if not files:
        problems.add(
            str(path),
            f"a folder with files of kind {', '.join(SUFFIXES)}",
            "none",
            "give another folder",
        )
    return [(suffix(file), str(file), _names(file)) for file in files]


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
