"""Tool calls and tool schemas in one canonical form, whichever way a row writes them.

A call is {"id"?, "type": "function", "function": {"name", "arguments": object}}, a schema
{"type": "function", "function": {"name", ...}}. Arguments may come as JSON text, as an object or as
pairs of key and value. Pure functions that raise `RowProblem`.
"""

from __future__ import annotations

import json
from typing import Any

from grads_ds.data.problems import RowProblem, found_text
from grads_ds.data.strict_json import loads

_ARGUMENTS = ("arguments", "parameters", "args", "input")


def calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """The canonical calls of a turn's `tool_calls`: a list, or JSON text of one."""
    value = _decoded(value, f"{where} with tool_calls as a JSON list")
    if not isinstance(value, list) or not all(isinstance(call, (dict, str)) for call in value):
        raise RowProblem(
            f"{where} with tool_calls as a list of objects",
            found_text(value),
            "write a list of calls",
        )
    return [call_of(call, where) for call in value]


def call_of(value: Any, where: str) -> dict[str, Any]:
    """One canonical call from {name, arguments}, {function: {...}} or JSON text of either."""
    call = _decoded(value, f"{where} with a tool call as JSON")
    function = _decoded(call.get("function", call), f"{where} with a tool call as JSON")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(
            f"{where} with a call of a named function", found_text(call), "write name and arguments"
        )
    given = [key for key in _ARGUMENTS if function.get(key) is not None]
    left = set(function) - {"name", "id", "type", "index", *_ARGUMENTS}
    if len(given) > 1 or (left and not given):
        raise RowProblem(
            f"{where} with a call of name and arguments",
            f"the fields {', '.join(sorted(function))}",
            "put what the function is called with under arguments",
        )
    arguments = arguments_of(function[given[0]] if given else {}, where)
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return named | {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def arguments_of(value: Any, where: str) -> dict[str, Any]:
    """Arguments as an object."""
    wanted = f"{where} with arguments of a tool call as JSON"
    while isinstance(value, str):
        value = _decoded(value, wanted) if value.strip() else {}
    if isinstance(value, list):
        pairs = [
            (item["key"], item["value"])
            if isinstance(item, dict) and set(item) == {"key", "value"}
            else item
            for item in value
        ]
        if all(isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs):
            value = {str(key): item for key, item in pairs}
    if not isinstance(value, dict):
        raise RowProblem(wanted, found_text(value), "write an object of named arguments")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise RowProblem(
            wanted, "NaN or Infinity, which JSON lacks", "write null or text"
        ) from None
    return value


def text_calls(text: str) -> list[dict[str, Any]] | None:
    """Canonical calls from sharegpt's JSON text ({name, arguments} or a list of them); None when it
    is something else.
    """
    try:
        value = loads(text)
    except json.JSONDecodeError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        return None
    return [call_of(call, "a function_call turn") for call in calls]


def schemas_of(value: Any) -> list[dict[str, Any]]:
    """Canonical schemas from a list, one schema, or JSON text of either; none from nothing."""
    wanted = "tools as a JSON list of objects"
    value = _decoded(value, wanted) if not isinstance(value, str) or value.strip() else None
    if not value:
        return []
    listed = [_decoded(tool, wanted) for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) for tool in listed):
        raise RowProblem(
            "tools as a list of objects", found_text(value), "write one object per tool"
        )
    return [_schema(tool) for tool in listed]


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    wanted = "tools as a JSON list of objects"
    function = _decoded(tool.get("function", tool), wanted)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem(
            "every tool with the name of its function", found_text(tool), "name the function"
        )
    if isinstance(function.get("parameters"), str):
        function = function | {"parameters": _decoded(function["parameters"], wanted)}
    outer = tool if "function" in tool else {}
    return {"type": "function", **outer, "function": function}


def _decoded(value: Any, wanted: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return loads(value)
    except json.JSONDecodeError as error:
        raise RowProblem(
            wanted, f"{error.msg} in {found_text(value)}", "correct the JSON"
        ) from None
