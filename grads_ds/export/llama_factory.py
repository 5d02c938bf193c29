"""The subset for LLaMA-Factory: sharegpt rows with OpenAI tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grads_ds.data.problems import RowProblem
from grads_ds.export.chosen_rows import (
    DATA,
    ELSEWHERE,
    NAME,
    each,
    is_context,
    of_one_kind,
    write_lines,
)

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """ShareGPT formatting with OpenAI tags, and the dataset_info.json that names it."""
    if "text" in of_one_kind(rows, "llamafactory")[0]:
        entry: dict[str, Any] = {"file_name": DATA, "columns": {"prompt": "text"}}
    else:
        rows = each(rows, _as_llama_factory)
        entry = {
            "file_name": DATA,
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "tools": "tools"},
            "tags": TAGS,
        }
    write_lines(rows, folder / DATA)
    (folder / "dataset_info.json").write_text(json.dumps({NAME: entry}, indent=2) + "\n")


def _as_llama_factory(row: dict[str, Any]) -> dict[str, Any]:
    """Role and text alone, calls and tools as JSON text.

    Its reader leaves out, with a warning, rows whose sides do not take turns.
    """
    messages = []
    for number, message in enumerate(row["messages"], 1):
        if is_context(message):
            raise RowProblem("answers that are all learnt", f"weight 0 at turn {number}", ELSEWHERE)
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            if content.strip():
                raise RowProblem(
                    "a turn that calls or speaks",
                    f"turn {number}, which does both",
                    "split or leave it out",
                )
            calls = [call["function"] for call in message["tool_calls"]]
            role, content = "function_call", json.dumps(calls, ensure_ascii=False)
        if message.get("reasoning_content"):  # as its templates with thinking read it
            if role == "function_call":
                raise RowProblem(
                    "a call without reasoning", f"turn {number} with both", "leave the row out"
                )
            content = f"<think>\n{message['reasoning_content']}\n</think>\n\n{content}"
        messages.append({"role": "observation" if role == "tool" else role, "content": content})
    said = [message["role"] for message in messages[messages[0]["role"] == "system" :]]
    sides = (("user", "observation"), ("assistant", "function_call"))
    wrong = next((place for place, role in enumerate(said) if role not in sides[place % 2]), None)
    if wrong is not None or len(said) % 2:
        raise RowProblem(
            "a user's turn or one tool result, then one answer, to the end",
            f"turns of {', '.join(said)}",
            "leave it out",
        )
    tools = [tool["function"] for tool in row.get("tools") or []]
    # the same columns in every row
    return {"messages": messages, "tools": json.dumps(tools, ensure_ascii=False)}
