"""JSON read strictly: what the standard parser would quietly change is an error with its place.

A key given twice keeps its last value there, an integer of thousands of digits and a value nested
thousands deep end in other exceptions; here each is a `json.JSONDecodeError`. Pure functions.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

DEEPEST = 100  # brackets inside brackets; every later reader has to go down as far


class _Unusable(ValueError):
    """A value that is valid JSON and still cannot be taken as it stands."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _Unusable(f"The key {twice!r} twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)


def loads(text: str) -> Any:
    """The value of `text`, which holds nothing else. Raises json.JSONDecodeError."""
    value, end = decode_at(text, len(text) - len(text.lstrip(" \t\r\n")))
    rest = text[end:].lstrip(" \t\r\n")
    if rest:
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """(the value that begins at `at`, where it ends). Raises json.JSONDecodeError."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError(f"More than {DEEPEST} levels of nesting", text, at) from None
    except _Unusable as error:
        raise json.JSONDecodeError(str(error), text, at) from None
    except ValueError:  # the interpreter's limit on the digits of an integer
        raise json.JSONDecodeError("An integer of thousands of digits", text, at) from None
    opened = text.count("{", at, end) + text.count("[", at, end)
    if opened > DEEPEST and deeper_than(value, DEEPEST):
        raise json.JSONDecodeError(f"More than {DEEPEST} levels of nesting", text, at)
    return value, end


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects lie more than `levels` deep in each other."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            item
            for outer in layer
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True
