"""What a row of each chat format says, one function per format, and the keys that tell it.

Pure functions over dicts; reads and writes nothing. All raise `RowProblem`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grads_ds.data.conversation import Conversation, Message, read_turns, text_of, turn_list
from grads_ds.data.problems import RowProblem, found_text
from grads_ds.data.tools import schemas_of

TURN_FIELDS = ("messages", "conversations", "conversation")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
# every field that a row of some format may have for what it says
FIELDS = frozenset(
    (*TURN_FIELDS, *SYSTEM_FIELDS, "instruction", "input", "output", "history")
    + ("prompt", "completion", "text", "tools", "functions")
)


def conversation_of(row: dict[str, Any], style: str) -> Conversation:
    """The conversation of a row in the given format, with the row's own system prompt and tools."""
    said = _FORMATS[style](row)
    if system := _system(row):
        first = said.messages[0]
        if first["role"] not in ("system", "developer"):
            said.messages.insert(0, {"role": "system", "content": system})
        elif first["content"] != system:
            raise RowProblem(
                "one system prompt", "one in the row and another in its first turn", "keep one"
            )
    said.tools = _tools(row, said)
    return said


def turns_field(row: dict[str, Any]) -> str | None:
    """The field of the row that holds its turns."""
    return next((name for name in TURN_FIELDS if row.get(name) is not None), None)


def _turns(row: dict[str, Any]) -> Conversation:
    field = turns_field(row) or TURN_FIELDS[0]
    return read_turns(row.get(field), field)


def _system(row: dict[str, Any]) -> str:
    given = {key: row[key] for key in SYSTEM_FIELDS if row.get(key) is not None}
    texts = {text_of(value, f"{key} as text") for key, value in given.items()} - {""}
    if len(texts) > 1:
        raise RowProblem("one system prompt", f"different ones in {', '.join(given)}", "keep one")
    return next(iter(texts), "")


def _tools(row: dict[str, Any], said: Conversation) -> list[dict[str, Any]]:
    given = [row.get("tools"), row.get("functions"), *said.tools]
    lists = [tools for tools in map(schemas_of, given) if tools]
    if any(tools != lists[0] for tools in lists):
        raise RowProblem(
            "the row's tools in one place", "different ones in two places", "keep one list"
        )
    return lists[0] if lists else []


def _alpaca(row: dict[str, Any]) -> Conversation:
    def part(key: str) -> str:
        return text_of(row.get(key) if row.get(key) is not None else "", f"{key} as text")

    instruction, extra, output = part("instruction"), part("input"), part("output")
    question = "\n\n".join(piece for piece in (instruction, extra) if piece.strip())
    if not question:
        raise RowProblem(
            "a question in instruction or input",
            "both empty",
            "write the question or remove the row",
        )
    messages: list[Message] = []
    history = turn_list(row.get("history"))
    for pair in history or []:
        if not (
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(isinstance(side, str) for side in pair)
        ):
            raise RowProblem(
                "history as a list of [question, answer]", found_text(pair), "write pairs of texts"
            )
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation(messages)


def _prompt_completion(row: dict[str, Any]) -> Conversation:
    prompt, completion = _turns_or_text(row["prompt"]), _turns_or_text(row["completion"])
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        context, learned = read_turns(prompt, "prompt"), read_turns(completion, "completion")
        asked = [m | ({"weight": 0} if m["role"] == "assistant" else {}) for m in context.messages]
        return Conversation(
            asked + learned.messages, context.tools + learned.tools, context.notes + learned.notes
        )
    found = f"{found_text(row['prompt'])} and {found_text(row['completion'])}"
    raise RowProblem(
        "prompt and completion both as text, or both as message lists",
        found,
        "use one kind for both",
    )


def _turns_or_text(value: Any) -> Any:
    """The turns that JSON text holds (csv), or the text itself where it holds something else."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    turns = turn_list(value)
    like = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
    return turns if like and all("role" in turn or "from" in turn for turn in turns) else value


_FORMATS: dict[str, Callable[[dict[str, Any]], Conversation]] = {
    "messages": _turns,
    "sharegpt": _turns,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def fits(row: dict[str, Any], style: str) -> bool:
    """Whether the row is of the format by its keys."""
    has = {key for key, value in row.items() if value is not None}
    if style in ("messages", "sharegpt"):
        field = turns_field(row)
        return field is not None and _sharegpt_like(row[field], field) == (style == "sharegpt")
    if style == "alpaca":
        return {"instruction", "output"} <= has
    if style in ("prompt_completion", "prompt_completion_text"):
        return {"prompt", "completion"} <= has
    return "text" in has


def _sharegpt_like(value: Any, field: str) -> bool:
    turns = turn_list(value)
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and ("role" in first or "from" in first):
        return "role" not in first
    return field != "messages"
