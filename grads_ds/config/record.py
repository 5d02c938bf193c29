"""The base of every section: frozen, typed, and closed to unknown keys."""

from __future__ import annotations

import os
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def expanded(value: Any) -> Any:
    """A path, or a list of them, with `~` and `$VAR` replaced: here alone, so that the same files
    are read and watched for changes.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value
