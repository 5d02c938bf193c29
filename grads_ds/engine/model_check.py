"""Is a folder a model that can be loaded? Looked at without loading it; no torch import."""

from __future__ import annotations

import json
from pathlib import Path

_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def check_model(path: str) -> list[str]:
    """Faults of a model folder: absent, no or broken config.json, no weights.

    A hub id is left to the hub's client.
    """
    folder = Path(path)
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return []  # owner/name
        return [
            f"model.path: wanted a Hugging Face folder or hub id; found nothing at {path}; give an"
            " existing folder"
        ]
    faults = []
    if not folder.is_dir():
        return [f"model.path: wanted a folder; {path} is a file; give the folder it lies in"]
    try:
        json.loads((folder / "config.json").read_text())
    except OSError:
        faults.append(
            f"model.path: wanted {path}/config.json; found none; give a Hugging Face model folder"
        )
    except ValueError as error:
        faults.append(
            f"model.path: {path}/config.json is not valid JSON ({error}); restore the file"
        )
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        faults.append(
            f"model.path: wanted weights (*.safetensors or *.bin) in {path}; found none; copy them"
            " there"
        )
    return faults
