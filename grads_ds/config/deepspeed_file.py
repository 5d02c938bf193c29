"""The DeepSpeed JSON of a run: a preset in the package, by name, or the user's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError, nearest
from grads_ds.config.text_file import text_of

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the DeepSpeed settings in the package: what `deepspeed:` takes beside a path."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def is_preset(name: str) -> bool:
    """Whether `deepspeed: name` means a preset; a file of that name is given as `./name`."""
    return name in preset_names()


def deepspeed_file(name: str) -> Path:
    """Where the settings lie: in the package for a preset's name, else the path itself."""
    return _FOLDER / f"{name}.json" if is_preset(name) else Path(name)


def read_deepspeed(name: str) -> dict[str, Any]:
    """The settings as they stand.

    Raises UserError when the file is missing or not a JSON object.
    """
    path = deepspeed_file(name)
    if not path.is_file():
        raise UserError(
            f"deepspeed: wanted a preset ({', '.join(preset_names())}) or a DeepSpeed JSON file;"
            f" found none at {path}; give a name or an existing path"
            f"{_hint(name)}"
        )
    try:
        value = json.loads(text_of(path, "deepspeed", "a DeepSpeed JSON file"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"deepspeed: {path}:{error.lineno}: not valid JSON ({error.msg}); fix that line"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"deepspeed: {path}: wanted a JSON object; found {type(value).__name__}")
    return value


def _hint(name: str) -> str:
    """The preset that a near miss of its name, or its file's, may mean."""
    found = nearest(Path(name).stem, preset_names())
    return found if "did you mean" in found else ""
