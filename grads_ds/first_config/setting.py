"""One value of a configuration with the reason for it, and the YAML text that shows both."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 100


@dataclass(frozen=True)
class Setting:
    """`key` has at most two parts (`probe.epochs`); `why` becomes the comment above it."""

    key: str
    value: Any
    why: str


def override(settings: Sequence[Setting], given: Sequence[Setting]) -> list[Setting]:
    """`settings` with the values of `given` in their place; keys that are new come behind."""
    new = {one.key: one for one in given}
    mine = [new.pop(one.key, one) for one in settings]
    return mine + list(new.values())


def as_yaml(settings: Sequence[Setting], heading: Sequence[str]) -> str:
    """The configuration file: heading as comments, then every section with its reasons."""
    lines = [part for text in heading for part in _comment(text, 0)]
    sections: dict[str, list[Setting]] = {}
    for one in settings:
        sections.setdefault(one.key.partition(".")[0], []).append(one)
    for section, members in sections.items():
        if len(members) == 1 and "." not in members[0].key:
            lines += ["", *_lines(members[0], section, 0)]
            continue
        lines += ["", f"{section}:"]
        for one in members:
            lines += _lines(one, one.key.partition(".")[2], 2)
    return "\n".join(lines) + "\n"


def _lines(one: Setting, key: str, indent: int) -> list[str]:
    """The comment and the value."""
    name, value, lead = key, one.value, " " * indent
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    text = text.removesuffix("\n").removesuffix("\n...")  # the document end of a bare value
    shown = [f"{lead}{name}: {text}"]
    if len(shown[0]) > WIDTH and isinstance(value, (list, dict)):
        block = yaml.safe_dump(value, default_flow_style=False, allow_unicode=True, width=10**6)
        shown = [f"{lead}{name}:", *(f"{lead}  {line}" for line in block.splitlines())]
    return _comment(one.why, indent) + shown


def _comment(text: str, indent: int) -> list[str]:
    lead = " " * indent + "# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=lead, subsequent_indent=lead, break_on_hyphens=False
    )
