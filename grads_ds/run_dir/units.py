"""Units of work: which are done, with which inputs, and why one is due again.

Every unit (a stage, or a part of one such as one variant's training) leaves `state/<unit>.json`
when it is done: its inputs and their digest, a fresh id, and its output files with size, time and
sha256. A unit is done while that record matches. Its id is an input of the units downstream, so
that redoing one redoes those after it. `state/<unit>.owned` is written before the work: what it
lists may be replaced, anything else in the run directory is somebody's own.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError, problem
from grads_ds.run_dir.digests import inputs_digest, sha256_once
from grads_ds.run_dir.publish import publish_json, refuse_folders, sweep

# at every start smaller files are read again, whatever their times say; larger ones when their
# size or time is another, and by the stage that reads them
_NO_RECORD = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
HASHED_BELOW = 8 * 2**20
# keys of a unit's inputs under which ids of other units stand, and what an id looks like
_UNIT_KEYS = ("prepare", "probe", "training", "scores", "select", "sft", "evaluate", "best")
_ID = re.compile("[0-9a-f]{32}")


def record_file(run_dir: Path, unit: str) -> Path:
    """Where a unit's record lies."""
    return run_dir / "state" / f"{unit.replace('/', '.')}.json"


def read_record(run_dir: Path, unit: str) -> dict[str, Any] | None:
    """The record of the unit's last completion; None where there is none, or a damaged one.

    Raises OSError for a record that cannot be read.
    """
    return read_record_file(record_file(run_dir, unit))


def read_record_file(file: Path) -> dict[str, Any] | None:
    """As `read_record`, of a file in `state/`."""
    try:
        record = json.loads(file.read_bytes())
        given = record.pop("record_sha256")
        whole = given == inputs_digest(record) and {"id", "inputs", "outputs"} <= record.keys()
    except (*_NO_RECORD, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return record if whole else None


def unit_id(run_dir: Path, unit: str) -> str | None:
    """The id of the unit's last completion, None when it never completed."""
    record = read_record(run_dir, unit)
    return str(record["id"]) if record else None


def why_due(
    run_dir: Path, unit: str, inputs: Mapping[str, Any], thorough: bool = False
) -> str | None:
    """None when the unit is done and its inputs are these; otherwise the reason it has to run, in
    words.

    `thorough`: every output is read and compared, whatever its size and time say.
    """
    record = read_record(run_dir, unit)
    if record is None:
        there = record_file(run_dir, unit).is_file()
        return "its record is damaged" if there else "not done yet"
    now = json.loads(json.dumps(inputs))
    if record["inputs"] != now:
        return _changes(record["inputs"], now)
    return next(iter(damaged_outputs(run_dir, record, thorough)), None)


def damaged_outputs(run_dir: Path, record: Mapping[str, Any], thorough: bool) -> list[str]:
    """What of a record's outputs is not as it was written, a sentence each. Raises OSError."""
    found = []
    for name, wanted in record["outputs"].items():
        path = run_dir / name
        if not path.is_file():
            found.append(f"{name} is gone")
            continue
        state = path.stat()
        same_size = state.st_size == wanted["size"]
        look = (
            thorough or state.st_size < HASHED_BELOW or state.st_mtime_ns != wanted["modified_ns"]
        )
        if not same_size or (look and sha256_once(path) != wanted["sha256"]):
            found.append(f"{name} was altered")
    return found


def foreign_outputs(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Which of the files `names` are there and are not what this run's units have made of each
    other's outputs, a sentence each: of another run, of an earlier state of this one, or altered.

    Raises OSError.
    """
    files = sorted((run_dir / "state").glob("*.json"))
    records = [record for file in files if (record := read_record_file(file))]
    ids = {record["id"] for record in records}
    found = []
    for name in names:
        record = next((record for record in records if name in record["outputs"]), None)
        if record is None:
            found += [f"{name}, which no unit of this run has recorded"] * (run_dir / name).exists()
        elif other := sorted(key for key, i in _unit_ids(record).items() if i not in ids):
            found.append(f"{name}, made with another {', '.join(other)} than this run has now")
        else:
            found += damaged_outputs(run_dir, record, thorough=True)
    return found


def _unit_ids(record: Mapping[str, Any]) -> dict[str, str]:
    """The ids of other units among a record's inputs, by their keys."""
    return {
        key: value
        for key, value in _flat(record["inputs"]).items()
        if key.partition(".")[0] in _UNIT_KEYS and isinstance(value, str) and _ID.fullmatch(value)
    }


def begin(run_dir: Path, unit: str, owned: Sequence[str]) -> None:
    """Say before the work which paths of the run directory are the unit's to replace.

    Raises UserError where one of them exists and no earlier start of the unit has said so, or a
    folder stands in the place of a file.
    """
    file = record_file(run_dir, unit).with_suffix(".owned")
    written = (read_record(run_dir, unit) or {"outputs": ()})["outputs"]
    refuse_folders(file, record_file(run_dir, unit), *(run_dir / name for name in written))
    if not file.exists() and not record_file(run_dir, unit).exists():
        strangers = [name for name in owned if (run_dir / name).exists()]
        if strangers:
            raise UserError(
                [
                    problem(
                        f"{run_dir / name}",
                        f"nothing there before {unit} has run",
                        "what no start of this run has written",
                        "move it away, or give another run_dir",
                    )
                    for name in strangers
                ]
            )
    for path in (*(run_dir / name for name in owned), record_file(run_dir, unit), file):
        sweep(path)
    publish_json(file, list(owned))


def read_owned(file: Path) -> list[str]:
    """What a `state/<unit>.owned` lists. Raises UserError for one that is damaged, OSError."""
    refuse_folders(file)
    try:
        names = json.loads(file.read_bytes())
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    except ValueError:
        pass
    wanted = f"the list of what {file.stem} may replace"
    raise UserError(
        problem(str(file), wanted, "another text", "remove it, its unit's next start writes it")
    )


def mark_done(
    run_dir: Path, unit: str, inputs: Mapping[str, Any], outputs: Sequence[str], seconds: float
) -> str:
    """Record the unit as done after `seconds`.

    `outputs` are files or folders in the run directory; returns the new id. Raises
    FileNotFoundError for one that is not there.
    """
    files: dict[str, dict[str, Any]] = {}
    for name in outputs:
        path = run_dir / name
        if not path.exists():
            raise FileNotFoundError(f"{unit} is done and has not written {path}")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                state = file.stat()
                files[str(file.relative_to(run_dir))] = {
                    "size": state.st_size,
                    "modified_ns": state.st_mtime_ns,
                    "sha256": sha256_once(file),
                }
    record = {
        "unit": unit,
        "id": uuid.uuid4().hex,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 3),
        "inputs": json.loads(json.dumps(inputs)),
        "inputs_digest": inputs_digest(inputs),
        "outputs": files,
    }
    publish_json(record_file(run_dir, unit), record | {"record_sha256": inputs_digest(record)})
    return str(record["id"])


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = _flat(then), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    shown = [
        (
            f"{key} changed"
            if len(str(new.get(key))) > 40 or len(str(old.get(key))) > 40
            else f"{key} was {old.get(key)}, now {new.get(key)}"
        )
        for key in changed[:3]
    ]
    return ", ".join(shown) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
