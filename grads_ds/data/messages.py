"""What a row of each chat format says: one function per format, row -> messages in the OpenAI
shape.

Pure functions over dicts; reads and writes nothing. All raise `RowFault` on a wrong type, an
unknown role or a missing text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from grads_ds.data.problems import RowFault

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}


def turn_list(value: Any) -> Any:
    """Turns as a list of dicts: also from JSON text (csv) and from a dict of columns (how
    `datasets` stores sequences).
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(column, list) for column in value.values())
    ):
        return [
            dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)
        ]
    return value


def _checked_turns(value: Any, field: str) -> list[dict[str, Any]]:
    turns = turn_list(value)
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{field} as a list of turns", found_text(value), "give the turns in order")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowFault(
                f"turn {number} of {field} as an object", found_text(turn), "write role and text"
            )
    return turns


def _messages(row: dict[str, Any]) -> list[Message]:
    field = "messages" if row.get("messages") is not None else "conversations"
    return _openai(row[field], field)


def _openai(value: Any, field: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_checked_turns(value, field), start=1):
        where = f"turn {number} of {field}"
        # arrow fills absent keys with null
        message = {key: item for key, item in turn.items() if item is not None}
        role = message.get("role")
        if role == "function":
            role = "tool"
        if role not in ROLES:
            raise RowFault(
                f"{where} with a role among {', '.join(ROLES)}",
                f"role {found_text(role)}",
                "correct the role",
            )
        calls = message.get("tool_calls")
        if calls is not None and (
            not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)
        ):
            raise RowFault(
                f"{where} with tool_calls as a list of objects",
                found_text(calls),
                "write a list of calls",
            )
        if not calls:
            message.pop("tool_calls", None)
        content = message.get("content", "" if calls else None)
        message |= {"role": role, "content": _text(content, f"{where} with content as text")}
        if message.get("weight", 1) not in (0, 1):
            raise RowFault(
                f"{where} with weight 0 or 1", found_text(message["weight"]), "use 0 or 1"
            )
        messages.append(message)
    return messages


def _text(content: Any, wanted: str) -> str:
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, dict) and p.get("type") == "text" for p in content)
    ):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise RowFault(wanted, found_text(content), "only text can be trained on")
    return content


def _sharegpt(row: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(_checked_turns(row["conversations"], "conversations"), start=1):
        where, said = f"turn {number} of conversations", turn.get("from")
        role = _SHAREGPT_ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise RowFault(
                f"{where} with 'from' among {known}", f"from {found_text(said)}", "correct the role"
            )
        content = _text(turn.get("value"), f"{where} with value as text")
        if said == "function_call":
            calls = _calls(content)
            messages.append(
                {"role": role, "content": "" if calls else content}
                | ({"tool_calls": calls} if calls else {})
            )
        else:
            messages.append({"role": role, "content": content})
    return messages


def _calls(text: str) -> list[dict[str, Any]] | None:
    """OpenAI tool calls from sharegpt's JSON text ({name, arguments} or a list of them); None when
    it is something else.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        return None
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for call in calls
    ]


def _alpaca(row: dict[str, Any]) -> list[Message]:
    def part(key: str) -> str:
        return _text(row.get(key) if row.get(key) is not None else "", f"{key} as text")

    instruction, extra, output = part("instruction"), part("input"), part("output")
    question = "\n\n".join(piece for piece in (instruction, extra) if piece.strip())
    if not question:
        raise RowFault(
            "a question in instruction or input",
            "both empty",
            "write the question or remove the row",
        )
    messages: list[Message] = (
        [{"role": "system", "content": row["system"]}]
        if isinstance(row.get("system"), str) and row["system"]
        else []
    )
    for pair in row.get("history") or []:
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(side, str) for side in pair)
        ):
            raise RowFault(
                "history as a list of [question, answer]", found_text(pair), "write pairs of texts"
            )
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": output},
    ]


def _prompt_completion(row: dict[str, Any]) -> list[Message]:
    prompt, completion = turn_list(row["prompt"]), turn_list(row["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [
            m | ({"weight": 0} if m["role"] == "assistant" else {})
            for m in _openai(prompt, "prompt")
        ]
        return context + _openai(completion, "completion")
    found = f"{found_text(row['prompt'])} and {found_text(row['completion'])}"
    raise RowFault(
        "prompt and completion both as text, or both as message lists",
        found,
        "use one kind for both",
    )


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise RowFault(
                "tools as a JSON list of objects",
                f"{error.msg} in {found_text(value)}",
                "mend the JSON",
            ) from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault("tools as a list of objects", found_text(value), "write one object per tool")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in value
    ]


def found_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


TO_MESSAGES: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
