"""What a row means: alpaca, sharegpt, OpenAI messages, prompt/completion or plain text -> one `Sample` of messages or text.

Reads rows (dicts) from `sources`; writes nothing. Pure functions. A row that does not fit raises `RowFault`, which `load_samples`
collects with the row's file and line, so that the user sees every fault at once.

Roles after normalisation are system, developer, user, assistant and tool; an assistant message with `weight` 0 is context, not target
(the OpenAI convention; also used for assistant turns inside a `prompt` message list).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.data.sources import Faults, RawRow, find_inputs, read

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
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
_LOOKS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, input, output",
    "prompt_completion": "prompt, completion",
    "text": "text",
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A normalised row: exactly one of `messages` and `text` is set."""

    source: str
    origin: str
    row: dict[str, Any]
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None


class RowFault(Exception):
    """One row does not fit: what was wanted, what was found, what to change."""

    def __init__(self, wanted: str, found: str, change: str):
        self.wanted, self.found, self.change = wanted, found, change
        super().__init__(f"wanted {wanted}; found {found}; {change}")


def load_samples(entries: Sequence[str], format: str, faults: Faults) -> Iterator[Sample]:
    """Yield the samples of all entries in order. `format` is one of FORMATS or "auto" (each file's first row decides)."""
    for item in find_inputs(entries, faults):
        chosen = None if format == "auto" else format
        for raw in read(item, faults):
            try:
                found = detect(raw.row)
                if chosen is None:
                    if found is None:
                        raise _unknown(raw.row)
                    chosen = found
                if found != chosen and not (found and _fits(raw.row, chosen)):
                    if found is None:
                        raise RowFault(f"a row of format {chosen} ({_LOOKS[chosen]})", _keys(raw.row), "complete or remove it")
                    whose = "the config's data.format" if format != "auto" else "the file's first row"
                    raise RowFault(
                        f"format {chosen}, as {whose} says", f"format {found}", "keep one format per file and config"
                    )
                yield normalise(raw, chosen)
            except RowFault as fault:
                faults.add(raw.origin, fault.wanted, fault.found, fault.change)


def detect(row: dict[str, Any]) -> str | None:
    """The format a row is in by its keys, None when it is none of FORMATS."""
    return next((name for name in FORMATS if _fits(row, name)), None)


def normalise(raw: RawRow, format: str) -> Sample:
    """The sample a row stands for. Raises RowFault."""
    row = raw.row
    if format == "text":
        if not isinstance(row["text"], str):
            raise RowFault("text as a string", _found(row["text"]), "write the text itself")
        return Sample(raw.source, raw.origin, row, text=row["text"])
    messages = _NORMALISERS[format](row)
    if not any(m["role"] == "assistant" for m in messages):
        raise RowFault("at least one assistant turn (there is nothing to learn otherwise)", _turns(messages), "add the answer")
    return Sample(raw.source, raw.origin, row, messages=messages, tools=_tools(row.get("tools")))


# ---- recognising ----------------------------------------------------------------------------------------------------


def _fits(row: dict[str, Any], format: str) -> bool:
    has = {key for key, value in row.items() if value is not None}
    if format == "messages":
        return "messages" in has or ("conversations" in has and not _sharegpt_like(row["conversations"]))
    if format == "sharegpt":
        return "conversations" in has and _sharegpt_like(row["conversations"])
    if format == "alpaca":
        return {"instruction", "output"} <= has
    if format == "prompt_completion":
        return {"prompt", "completion"} <= has
    return "text" in has


def _sharegpt_like(value: Any) -> bool:
    turns = _turn_list(value)
    return not (isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0])


def _unknown(row: dict[str, Any]) -> RowFault:
    looks = "; ".join(f"{name} ({_LOOKS[name]})" for name in FORMATS)
    return RowFault(f"one of the formats {looks}", _keys(row), "rename the fields or convert the file")


def _keys(row: dict[str, Any]) -> str:
    return f"the fields {', '.join(map(repr, list(row)[:10]))}" if row else "no fields"


def _found(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _turns(messages: list[Message]) -> str:
    return f"turns of {', '.join(m['role'] for m in messages[:8])}" if messages else "no turns"


# ---- one function per format: row -> messages -----------------------------------------------------------------------


def _turn_list(value: Any) -> Any:
    """Turns as a list of dicts: also from JSON text (csv) and from a dict of columns (how `datasets` stores sequences)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    return value


def _checked_turns(value: Any, field: str) -> list[dict[str, Any]]:
    turns = _turn_list(value)
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{field} as a list of turns", _found(value), "give the turns in order")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowFault(f"turn {number} of {field} as an object", _found(turn), "write role and text")
    return turns


def _messages(row: dict[str, Any]) -> list[Message]:
    field = "messages" if row.get("messages") is not None else "conversations"
    return _openai(row[field], field)


def _openai(value: Any, field: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_checked_turns(value, field), start=1):
        where = f"turn {number} of {field}"
        message = {key: item for key, item in turn.items() if item is not None}  # arrow fills absent keys with null
        role = message.get("role")
        if role == "function":
            role = "tool"
        if role not in ROLES:
            raise RowFault(f"{where} with a role among {', '.join(ROLES)}", f"role {_found(role)}", "correct the role")
        calls = message.get("tool_calls")
        if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
            raise RowFault(f"{where} with tool_calls as a list of objects", _found(calls), "write a list of calls")
        if not calls:
            message.pop("tool_calls", None)
        content = message.get("content", "" if calls else None)
        message |= {"role": role, "content": _text(content, f"{where} with content as text")}
        if message.get("weight", 1) not in (0, 1):
            raise RowFault(f"{where} with weight 0 or 1", _found(message["weight"]), "use 0 or 1")
        messages.append(message)
    return messages


def _text(content: Any, wanted: str) -> str:
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise RowFault(wanted, _found(content), "only text can be trained on")
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
            raise RowFault(f"{where} with 'from' among {known}", f"from {_found(said)}", "correct the role")
        content = _text(turn.get("value"), f"{where} with value as text")
        if said == "function_call":
            calls = _calls(content)
            messages.append({"role": role, "content": "" if calls else content} | ({"tool_calls": calls} if calls else {}))
        else:
            messages.append({"role": role, "content": content})
    return messages


def _calls(text: str) -> list[dict[str, Any]] | None:
    """OpenAI tool calls from sharegpt's JSON text ({name, arguments} or a list of them); None when it is something else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}} for call in calls
    ]


def _alpaca(row: dict[str, Any]) -> list[Message]:
    def part(key: str) -> str:
        return _text(row.get(key) if row.get(key) is not None else "", f"{key} as text")

    instruction, extra, output = part("instruction"), part("input"), part("output")
    question = "\n\n".join(piece for piece in (instruction, extra) if piece.strip())
    if not question:
        raise RowFault("a question in instruction or input", "both empty", "write the question or remove the row")
    messages: list[Message] = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []
    for pair in row.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, str) for side in pair)):
            raise RowFault("history as a list of [question, answer]", _found(pair), "write pairs of texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _prompt_completion(row: dict[str, Any]) -> list[Message]:
    prompt, completion = _turn_list(row["prompt"]), _turn_list(row["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [m | ({"weight": 0} if m["role"] == "assistant" else {}) for m in _openai(prompt, "prompt")]
        return context + _openai(completion, "completion")
    found = f"{_found(row['prompt'])} and {_found(row['completion'])}"
    raise RowFault("prompt and completion both as text, or both as message lists", found, "use one kind for both")


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise RowFault("tools as a JSON list of objects", f"{error.msg} in {_found(value)}", "mend the JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault("tools as a list of objects", _found(value), "write one object per tool")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]


_NORMALISERS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
