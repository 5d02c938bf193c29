"""Writes docs/config.md: every key of a configuration with its type, default and meaning.

    python scripts/config_page.py            print it
    python scripts/config_page.py --write    write docs/config.md

Reads the config records of `grads_ds/config`. A test keeps the page equal to the records.
"""

from __future__ import annotations

import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from grads_ds.config.config import Config
from grads_ds.config.record import NO_RESULT

PAGE = REPO / "docs/config.md"
HEAD = """\
# Every key of a configuration

Written by `python scripts/config_page.py --write` from the records in `grads_ds/config`.
`grads-ds init` writes a configuration for your files and model; `grads-ds config --schema` prints
the same keys as a JSON schema, by which editors complete and check them. `--set key=value`
overrides any key. Unknown keys are refused with the nearest valid name.

A key with † changes no result: a finished stage stays finished when it changes. Every other key
makes exactly the stages due again whose results hang on it.
"""


def kind(annotation: Any) -> str:
    """A type as the page shows it."""
    if annotation is type(None):
        return "null"
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part) for part in parts)
    if origin is list:
        return f"list of {kind(parts[0])}"
    if origin is tuple:
        return f"{len(parts)} x {kind(parts[0])}"
    if origin is dict:
        return f"{kind(parts[0])}: {kind(parts[1])}"
    if origin is typing.Annotated:
        return kind(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys below"
    names = {str: "text", float: "number", int: "whole number", bool: "true, false", Any: "value"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(field: Any) -> str:
    """The limits of a number, in words."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{word} {getattr(item, name):g}"
        for name, word in words.items()
        for item in field.metadata
        if getattr(item, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def default(field: Any) -> str:
    """The value a key has when it is not given."""
    if field.is_required():
        return "needed"
    value = field.default_factory() if field.default_factory else field.default
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value)


def nested(annotation: Any) -> list[type[BaseModel]]:
    """The records inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for part in typing.get_args(annotation) for record in nested(part)]


def section(name: str, record: type[BaseModel]) -> list[str]:
    """A heading, the record's own words and a table of its keys; then the records inside it."""
    lines = ["", f"## {name}" if name else "## Top level", ""]
    words = " ".join((record.__doc__ or "").split())
    lines += [*textwrap.wrap(words, 100, break_long_words=False, break_on_hyphens=False), ""]
    lines += ["| key | what it takes | default | what it is |", "|---|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for key, field in record.model_fields.items():
        if field.exclude:
            continue
        mark = " †" if field.json_schema_extra == NO_RESULT else ""
        cells = (kind(field.annotation) + bounds(field), default(field), field.description or "")
        shown = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| `{key}`{mark} | {shown} |")
        inner += [(f"{name}.{key}" if name else key, found) for found in nested(field.annotation)]
    for path, found in inner:
        lines += section(path, found)
    return lines


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(section("", Config)) + "\n"


def keys(record: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that a configuration may hold."""
    found = []
    for key, field in record.model_fields.items():
        if not field.exclude:
            found.append(f"{prefix}{key}")
            for inner in nested(field.annotation):
                found += keys(inner, f"{prefix}{key}.")
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
