"""The base of every section: frozen, typed, and closed to unknown keys."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
