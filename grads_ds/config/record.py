"""The base of every section: frozen, typed, and closed to unknown keys."""

from __future__ import annotations

import os
import re
from typing import Any

from pydantic import BaseModel, ConfigDict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# on a field: how often something is kept, or how work is cut up. A finished unit stays finished
# and a checkpoint is gone on from when it changes.
NO_RESULT: Any = {"no_result_depends_on_it": True}


class Record(BaseModel):
    """A section. `Field(..., json_schema_extra=NO_RESULT)` marks keys no result depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def inputs(self, exclude: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
        """The keys that results depend on, as plain values; `exclude` leaves out more of them."""
        marked = {
            name
            for name, field in type(self).model_fields.items()
            if field.json_schema_extra == NO_RESULT
        }
        found = self.model_dump(mode="json", exclude=marked | exclude)
        for name in found:
            if isinstance(value := getattr(self, name), Record):
                found[name] = value.inputs()
        return found


def expanded(value: Any) -> Any:
    """A path, or a list of them, with `~` and `$VAR` replaced: here alone, so that the same files
    are read and watched for changes.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value
