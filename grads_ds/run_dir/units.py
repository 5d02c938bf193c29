"""Units of work: which are done, with which inputs, and why one is due again.

Every unit (a stage, or a part of one such as one variant's training) leaves `state/<unit>.json`
when it is done: its inputs, a fresh id, and its output files with their sizes. A unit is done while
that record matches. Its id is an input of the units downstream, so that redoing one redoes those
after it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grads_ds.run_dir.publish import publish_json


def _marker(run_dir: Path, unit: str) -> Path:
    return run_dir / "state" / f"{unit.replace('/', '.')}.json"


def unit_id(run_dir: Path, unit: str) -> str | None:
    """The id of the unit's last completion, None when it never completed."""
    try:
        return str(json.loads(_marker(run_dir, unit).read_text())["id"])
    except (OSError, ValueError, KeyError):
        return None


def why_due(run_dir: Path, unit: str, inputs: Mapping[str, Any]) -> str | None:
    """None when the unit is done and its inputs are these; otherwise the reason it has to run, in
    words.
    """
    try:
        record = json.loads(_marker(run_dir, unit).read_text())
        then, outputs = record["inputs"], record["outputs"]
    except (OSError, ValueError, KeyError):
        return "not done yet"
    now = json.loads(json.dumps(inputs))
    if then != now:
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
    for name, size in outputs.items():
        path = run_dir / name
        if not path.is_file():
            return f"{name} is gone"
        if path.stat().st_size != size:
            return f"{name} was altered"
    return None


def mark_done(
    run_dir: Path, unit: str, inputs: Mapping[str, Any], outputs: Sequence[str], seconds: float
) -> str:
    """Record the unit as done after `seconds`.

    `outputs` are files or folders in the run directory; returns the new id.
    """
    files: dict[str, int] = {}
    for name in outputs:
        path = run_dir / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                files[str(file.relative_to(run_dir))] = file.stat().st_size
    new_id = uuid.uuid4().hex
    publish_json(
        _marker(run_dir, unit),
        {
            "unit": unit,
            "id": new_id,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(seconds, 3),
            "inputs": inputs,
            "outputs": files,
        },
    )
    return new_id


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
