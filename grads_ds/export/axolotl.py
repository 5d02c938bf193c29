"""The subset for Axolotl: chat_template rows, which tell turn by turn what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from grads_ds.export.chosen_rows import DATA, each, is_context, of_one_kind, without, write_lines


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """chat_template or completion data, and the `datasets` part of an Axolotl config."""
    if "text" in of_one_kind(rows, "axolotl")[0]:
        entry: dict[str, Any] = {
            "path": DATA,
            "ds_type": "json",
            "type": "completion",
            "field": "text",
        }
    else:
        rows = each(rows, _as_axolotl)
        entry = {
            "path": DATA,
            "ds_type": "json",
            "type": "chat_template",
            "field_messages": "messages",
            "field_tools": "tools",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles_to_train": ["assistant"],
            "message_field_training": "train",
            "train_on_eos": "turn",
        }
    write_lines(rows, folder / DATA)
    (folder / "axolotl.yaml").write_text(yaml.safe_dump({"datasets": [entry]}, sort_keys=False))


def _as_axolotl(row: dict[str, Any]) -> dict[str, Any]:
    """Turns that are not to be learnt say so; arguments and parameters are JSON text, as no two
    calls have the same fields.
    """
    messages = []
    for message in row["messages"]:
        turn = without(message, "weight") | ({"train": False} if is_context(message) else {})
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_arguments_as_text(call) for call in turn["tool_calls"]]
        messages.append(turn)
    tools = []
    for tool in row.get("tools") or []:
        function = tool["function"]
        if "parameters" in function:
            function = function | {
                "parameters": json.dumps(function["parameters"], ensure_ascii=False)
            }
        tools.append(tool | {"function": function})
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}
