"""One turn of any chat format -> one message in the OpenAI shape, and what the turn says besides.

A message has `role`, `content` (text), where given `reasoning_content`, `tool_calls` in canonical
form, and `weight` 0 where it is not to be learned; further keys of the turn stay. Pure functions
that raise `RowProblem` on a wrong type, an unknown role, a missing text or keys that contradict.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from grads_ds.data.exclusions import read_marks
from grads_ds.data.problems import RowProblem, found_text
from grads_ds.data.strict_json import loads
from grads_ds.data.tools import call_of, calls_of, text_calls

Message = dict[str, Any]
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
_TEXT_TYPES = (None, "text", "input_text", "output_text")
_TEXT_KEYS = ("text", "content", "value", "input_text", "output_text")
_PLAIN = {"role", "content"}


@dataclass
class Conversation:
    """Messages, the tool schemas found inside them, and what is to be said of them once."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def turn_list(value: Any) -> Any:
    """Turns as a list of dicts: also from JSON text (csv) and from a dict of columns (how
    `datasets` stores sequences). Raises RowProblem when the columns have different lengths.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = loads(value)
        except json.JSONDecodeError:
            return value
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(column, list) for column in value.values())
    ):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise RowProblem(
                "turns as columns of one length", f"{lengths}", "give every turn all its fields"
            )
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value


def read_turns(value: Any, name: str) -> Conversation:
    """The conversation in `value`, the row's field `name`."""
    turns = turn_list(value)
    if not isinstance(turns, list) or not turns:
        raise RowProblem(f"{name} as a list of turns", found_text(value), "give the turns in order")
    said = Conversation()
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RowProblem(
                f"turn {number} of {name} as an object", found_text(turn), "write role and text"
            )
        said.messages.append(_message(turn, f"turn {number} of {name}", said))
    return said


def _message(turn: dict[str, Any], where: str, said: Conversation) -> Message:
    message = {key: item for key, item in turn.items() if item is not None}
    name, role = _role(message, where)
    keys = ("value", "content") if "from" in message else ("content", "value")
    text_key = _only_key(message, keys, where)
    if message.keys() == _PLAIN and type(message["content"]) is str and role == name:
        return message
    learned, marks, unknown = read_marks(message, where)
    said.notes += [
        f"turn key {key!r} looks like a mark of what to learn and is not read" for key in unknown
    ]
    # text, reasoning and calls, each out of whichever key holds it
    content, thoughts, calls = _parts(message.pop(text_key, None), where)
    reasoning = _reasoning(message, thoughts, where)
    calls += _calls(message, where)
    if name in ("function_call", "tool_call") and isinstance(content, str):
        found = text_calls(content)
        content, calls = ("", calls + found) if found else (content, calls)
    for key in ("tools", "functions"):
        if key in message:
            said.tools.append(message.pop(key))
    if content is None and not calls and reasoning is None:
        raise RowProblem(
            f"{where} with {text_key} as text", found_text(None), "only text can be trained on"
        )
    for key in ("role", "from", *marks):
        message.pop(key, None)
    # the keys in the order that every format gives them
    built: Message = {"role": role, "content": content or "", **message}
    if reasoning is not None:
        built["reasoning_content"] = reasoning
    if calls:
        built["tool_calls"] = calls
    if role == "assistant" and learned is False:
        built["weight"] = 0
    elif role != "assistant" and learned:
        said.notes.append(f"{role} turns marked to be learned are not: answers alone are")
    return built


def _role(message: Message, where: str) -> tuple[str, str]:
    key = _only_key(message, ("role", "from"), where)
    name = message.get(key)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        wanted = (
            f"{where} with a role among {', '.join(dict.fromkeys(ROLES.values()))}"
            if key == "role"
            else f"{where} with 'from' among {', '.join(ROLES)}"
        )
        raise RowProblem(wanted, f"{key} {found_text(name)}", "correct the role")
    return str(name), role


def _only_key(message: Message, keys: tuple[str, str], where: str) -> str:
    if keys[0] in message and keys[1] in message and message[keys[0]] != message[keys[1]]:
        raise RowProblem(
            f"{where} with {keys[0]} or {keys[1]}", "both, with different values", "keep one"
        )
    return keys[1] if keys[1] in message and keys[0] not in message else keys[0]


def text_of(value: Any, wanted: str) -> str:
    """A text given as such or in text parts. Raises RowProblem."""
    content, thoughts, calls = _parts(value, wanted)
    if content is None or thoughts or calls:
        raise RowProblem(wanted, found_text(value), "only text can be trained on")
    return content


def _parts(value: Any, where: str) -> tuple[str | None, list[str], list[dict[str, Any]]]:
    """(text, reasoning, calls) of a content; text is None where it has none."""
    if value is None or isinstance(value, str):
        return value, [], []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in value if isinstance(value, list) else [value]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in _TEXT_TYPES:
            texts.append(_one_text(part, _TEXT_KEYS, where))
        elif kind in ("thinking", "reasoning", "thought") and not texts:
            thoughts.append(_one_text(part, (str(kind), *REASONING_KEYS, *_TEXT_KEYS), where))
        elif kind == "refusal":
            texts.append(_one_text(part, ("refusal", *_TEXT_KEYS), where))
        elif kind in ("tool_use", "tool_call", "function"):
            calls.append(call_of(part, where))
        else:
            raise RowProblem(
                f"{where} with content as text", found_text(part), "only text can be trained on"
            )
    if not texts and not thoughts and not calls:
        raise RowProblem(f"{where} with content as text", found_text(value), "write the text")
    return "".join(texts) if texts else None, thoughts, calls


def _one_text(part: dict[str, Any], keys: tuple[str, ...], where: str) -> str:
    found = {key: part[key] for key in dict.fromkeys(keys) if part.get(key) is not None}
    if len(found) != 1 or not isinstance(next(iter(found.values())), str):
        raise RowProblem(
            f"{where} with content as text", found_text(part), "give each part one text"
        )
    return str(next(iter(found.values())))


def _reasoning(message: Message, thoughts: list[str], where: str) -> str | None:
    given = [
        text_of(message.pop(key), f"{where} with {key} as text")
        for key in REASONING_KEYS
        if key in message
    ]
    given = [text for text in (*given, "".join(thoughts)) if text]
    if len(set(given)) > 1:
        raise RowProblem(f"{where} with one reasoning", "different ones in two keys", "keep one")
    return given[0] if given else None


def _calls(message: Message, where: str) -> list[dict[str, Any]]:
    calls = message.pop("tool_calls", None)
    old = message.pop("function_call", None)
    found = calls_of(calls, where) if calls else []
    if old:
        legacy = call_of(old, where)
        if not found:
            return [legacy]
        if [call["function"] for call in found] != [legacy["function"]]:
            raise RowProblem(
                f"{where} with tool_calls or function_call", "both, different", "keep one"
            )
    return found
