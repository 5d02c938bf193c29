"""Where the data of another tool's configuration lie.

Reads, for LLaMA-Factory, `dataset_info.json`; writes nothing. Paths are looked for where the
command is started, then beside the configuration, as the tools do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grads_ds.config.errors import problem

# of one set; its format is told by its rows
_OF_ENTRY = frozenset(
    ("path", "data_files", "field_messages", "type", "ds_type")
    + ("file_name", "hf_hub_url", "formatting", "columns")
)
_COLUMNS = frozenset(
    ("instruction", "input", "output", "messages", "conversations", "conversation", "system")
    + ("tools", "history", "prompt", "completion", "text")
)


def sources_of(
    tool: str, given: Mapping[str, Any], path: Path, problems: list[str]
) -> tuple[list[str], set[str], list[str]]:
    """(sources, the keys they were read from, keys of single sets that are not taken over)."""
    left: list[str] = []
    if tool == "LLaMA-Factory":
        return _registered(given, path, problems, left), {"dataset", "dataset_dir"}, left
    entries = given.get("datasets") or [{"path": given.get("dataset_name")}]
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        files = entry.get("data_files") or entry.get("path")
        field = entry.get("field_messages", "messages")
        if not files or field not in _COLUMNS:
            wanted = "path, and messages under a name that grads-ds reads"
            problems.append(problem(f"{path}: datasets", wanted, f"{entry}", "rename the field"))
            continue
        found += [place_of(str(file), path) for file in _list(files)]
        left += [f"datasets.{key}" for key in entry if key not in _OF_ENTRY]
    return found, {"datasets" if given.get("datasets") else "dataset_name"}, sorted(set(left))


def _registered(
    given: Mapping[str, Any], path: Path, problems: list[str], left: list[str]
) -> list[str]:
    """The files of LLaMA-Factory's `dataset_info.json` that `dataset` names; keys of an entry that
    are not taken over go to `left`.
    """
    folder = Path(place_of(str(given.get("dataset_dir", "data")), path))
    try:
        known = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        fix = "set dataset_dir"
        problems.append(problem(f"{path}: dataset_dir", "dataset_info.json", str(error), fix))
        return []
    found = []
    known = known if isinstance(known, dict) else {}
    for name in map(str.strip, given["dataset"].split(",")):
        entry = known.get(name, {})
        entry = entry if isinstance(entry, dict) else {}
        strange = set(map(str, (entry.get("columns") or {}).values())) - _COLUMNS
        place = entry.get("file_name") or entry.get("hf_hub_url")
        if not place or strange:
            wanted = "a file_name, and columns under names that grads-ds reads"
            shown = f"columns {', '.join(sorted(strange))}" if strange else "no such entry"
            problems.append(problem(f"{path}: dataset {name}", wanted, shown, "rename them"))
            continue
        found.append(str(folder / place) if entry.get("file_name") else place)
        left += [f"{name}.{key}" for key in entry if key not in _OF_ENTRY]
    return found


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def place_of(name: str, path: Path) -> str:
    """`name` where it is: here, else beside the file; as it stands where neither (a hub id)."""
    beside = path.parent / name
    return str(beside) if not Path(name).exists() and beside.exists() else name
