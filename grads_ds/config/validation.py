"""A validation error of pydantic as a sentence: dotted key, wanted, found, change."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from grads_ds.config.errors import nearest


def validation_sentence(item: Any, root: type[BaseModel], prefix: str = "") -> str:
    """One pydantic error as: dotted key, wanted, found, change."""
    loc = [str(part) for part in item["loc"]]
    # union branches ('float', 'literal[...]', 'list[str]', 'function-...') are pydantic's, not the
    # user's keys
    keys = [
        part
        for part in loc
        if not re.fullmatch(r"(float|int|str|list\[.*|literal\[.*|function.*|constrained.*)", part)
    ]
    key = ".".join(([prefix] if prefix else []) + keys) or "(top level)"
    if item["type"] == "extra_forbidden":
        record = _record(root, keys[:-1])
        if reason := getattr(record, "REFUSED", {}).get(keys[-1]):
            return f"{key}: cannot be set; {reason}"
        names = list(record.model_fields) if record else []
        return f"{key}: unknown key{nearest(keys[-1], names)}"
    if item["type"] == "missing":
        return f"{key}: missing; add it"
    message = item["msg"].removeprefix("Value error, ")
    found = item.get("input")
    shown = "" if isinstance(found, (dict, list)) or "found" in message else f"; found {found!r}"
    return f"{key}: {message}{shown}"


def _record(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The section that the keys lead to from `model`; None where they lead elsewhere."""
    for key in keys:
        field = model.model_fields.get(key)
        if field is None:
            return None
        inner = [
            t
            for t in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(t, type)
        ]
        models = [t for t in inner if issubclass(t, BaseModel)]
        if not models:
            return None
        model = models[0]
    return model
