"""Which files of a folder are read: those of a known kind, of the split train where the folder has
splits; every other one is named with its reason.

Splits are told by the dataset card (README.md) of a cloned hub repository, or by the words train,
test, validation and the like in the names of files and folders, as the hub itself tells them. Reads
names and the card, never rows.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from grads_ds.config.errors import WRONG_PATH
from grads_ds.data.problems import Problems

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_PACKABLE = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_PACKINGS = (".gz", ".bz2", ".xz", ".zst")
# `datasets`' own bookkeeping
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_TRAIN = {"train", "training"}
_HELD_OUT = {"test", "testing", "eval", "evaluation", "heldout", "holdout"} | {
    *("valid", "validation", "val", "dev")
}
_NAMED = 5  # files of one reason that a message names
_DATA_FILES = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def suffix(path: Path) -> str:
    """The kind of a file by its ending, without that of a packing; "" when it cannot be read."""
    name = path.name.lower()
    packing = next((ending for ending in _PACKINGS if name.endswith(ending)), "")
    stem = Path(name.removesuffix(packing))
    if stem.suffix == ".txt" and Path(stem.stem).suffix in SUFFIXES:  # data.jsonl.txt is neither
        return ""
    return stem.suffix if stem.suffix in (_PACKABLE if packing else SUFFIXES) else ""


def files_of(folder: Path, problems: Problems) -> list[Path]:
    """The folder's files to read, in an order that is the same on every file system.

    What is left out is said by `problems.note`.
    """
    left: dict[str, list[str]] = {}
    files = _walk(folder, left)
    texts = [file for file in files if suffix(file) == ".txt"]
    if 0 < len(texts) < len(files):  # licences and notes, most often
        files = [file for file in files if file not in texts]
        left["text beside rows"] = [str(file.relative_to(folder)) for file in texts]
    splits = {file: _split(file.relative_to(folder), _card_splits(folder)) for file in files}
    if "train" in splits.values() and set(splits.values()) - {"train", None}:
        for file, split in splits.items():
            if split != "train":
                reason = f"split {split}" if split else "no part of a split"
                left.setdefault(f"{reason}; only train is read", []).append(
                    str(file.relative_to(folder))
                )
        files = [file for file in files if splits[file] == "train"]
    seen: dict[tuple[int, int], Path] = {}
    for file in list(files):
        first = seen.setdefault(file_identity(file), file)
        if first != file:
            files.remove(file)
            left.setdefault(f"the same file as {first.relative_to(folder)}", []).append(
                str(file.relative_to(folder))
            )
    if left:
        problems.note(f"{folder}: not read: {'; '.join(map(_worded, sorted(left.items())))}")
    return files


def file_identity(path: Path) -> tuple[int, int]:
    """What is the same for every spelling of, and every link to, a file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _worded(entry: tuple[str, list[str]]) -> str:
    reason, names = entry
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(sorted(names)[:_NAMED])}{more} ({reason})"


def _walk(folder: Path, left: dict[str, list[str]]) -> list[Path]:
    def leave(path: Path, reason: str) -> None:
        left.setdefault(reason, []).append(str(path.relative_to(folder)))

    files = []
    for root, folders, names in os.walk(folder):
        for name in list(folders):
            path = Path(root, name)
            if path.is_symlink():
                leave(path, "a linked folder")
            elif name.startswith((".", "_")):
                leave(path, f"a name that begins with {name[0]}")
            else:
                continue
            folders.remove(name)
        for name in names:
            path = Path(root, name)
            if name.startswith((".", "_")):
                leave(path, f"a name that begins with {name[0]}")
            elif not path.is_file():
                leave(path, "a link to nothing" if path.is_symlink() else "no regular file")
            elif name in _NOT_ROWS:
                leave(path, "a description of the data")
            elif not suffix(path):
                ending = "".join(path.suffixes[-2:])
                leave(path, f"the ending {ending}" if ending else "no ending")
            else:
                files.append(path)
    return sorted(files, key=lambda file: file.relative_to(folder).parts)


def _split(file: Path, card: dict[str, list[str]]) -> str | None:
    """The split a file belongs to; None where nothing says so."""
    for name, patterns in card.items():
        if any(fnmatch(str(file), pattern) for pattern in patterns):
            return "train" if _class(name) == "train" else name
    if any(patterns for patterns in card.values()):
        return None  # the card lists the files of its splits, and this is none of them
    for part in reversed(file.parts):
        stem = part.lower()
        named = [n for n in card if re.match(re.escape(n.lower()) + r"(?![a-z0-9])", stem)]
        if named:
            longest = max(named, key=len)
            return "train" if _class(longest) == "train" else longest
        if found := _class(part):
            return found
    return None


def _class(name: str) -> str | None:
    words = set(re.split(r"[^a-z]+", name.lower()))
    if words & _TRAIN:
        return None if words & _HELD_OUT else "train"
    return next(iter(sorted(words & _HELD_OUT)), None)


def _card_splits(folder: Path) -> dict[str, list[str]]:
    """Splits of a dataset card and the patterns of their files, as far as it gives them."""
    try:
        matter = _DATA_FILES.match((folder / "README.md").read_text(encoding="utf-8"))
        card = yaml.safe_load(matter.group(1)) if matter else None
    except (*WRONG_PATH, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(card, dict):
        return {}
    found: dict[str, list[str]] = {}
    for config in _listed(card.get("configs")):
        files = config.get("data_files")
        if isinstance(files, dict):
            files = [{"split": split, "path": path} for split, path in files.items()]
        for entry in _listed(files):
            paths = entry.get("path", [])
            patterns = [paths] if isinstance(paths, str) else paths
            found.setdefault(str(entry.get("split", "train")), []).extend(
                str(pattern).removeprefix("./").replace("**/", "*") for pattern in patterns
            )
    for info in _listed(card.get("dataset_info")):
        for entry in _listed(info.get("splits")):
            found.setdefault(str(entry.get("name")), [])
    for entry in _listed(card.get("splits")):
        found.setdefault(str(entry.get("name")), [])
    return found


def _listed(value: Any) -> list[dict[str, Any]]:
    values = value if isinstance(value, list) else [value]
    return [item if isinstance(item, dict) else {"name": item} for item in values if item]
