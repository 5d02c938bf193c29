"""What a row means: alpaca, sharegpt, OpenAI messages, prompt/completion or plain text -> one
`Sample` of messages or text.

Reads rows (dicts) from `sources`; writes nothing. Pure functions. A row that does not fit raises
`RowFault`, which `load_samples` collects with the row's file and line, so that the user sees every
fault at once.

Roles after normalisation are system, developer, user, assistant and tool; an assistant message with
`weight` 0 is context, not target (the OpenAI convention; also used for assistant turns inside a
`prompt` message list).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.data.messages import TO_MESSAGES, Message, found_text, tools_of, turn_list
from grads_ds.data.problems import Faults, RowFault
from grads_ds.data.sources import RawRow, find_inputs, read

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
_LOOKS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, input, output",
    "prompt_completion": "prompt, completion",
    "text": "text",
}


@dataclass(frozen=True)
class Sample:
    """A normalised row: exactly one of `messages` and `text` is set."""

    source: str
    origin: str
    row: dict[str, Any]
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None


def load_samples(entries: Sequence[str], style: str, faults: Faults) -> Iterator[Sample]:
    """Yield the samples of all entries in order. `style` is one of FORMATS or "auto" (each file's
    first row decides).
    """
    for item in find_inputs(entries, faults):
        chosen = None if style == "auto" else style
        for raw in read(item, faults):
            try:
                found = detect(raw.row)
                if chosen is None:
                    if found is None:
                        raise _unknown(raw.row)
                    chosen = found
                if found != chosen and not (found and _fits(raw.row, chosen)):
                    if found is None:
                        raise RowFault(
                            f"a row of format {chosen} ({_LOOKS[chosen]})",
                            _keys(raw.row),
                            "complete or remove it",
                        )
                    whose = (
                        "the config's data.format" if style != "auto" else "the file's first row"
                    )
                    raise RowFault(
                        f"format {chosen}, as {whose} says",
                        f"format {found}",
                        "keep one format per file and config",
                    )
                yield normalise(raw, chosen)
            except RowFault as fault:
                faults.add(raw.origin, fault.wanted, fault.found, fault.change)


def detect(row: dict[str, Any]) -> str | None:
    """The format a row is in by its keys, None when it is none of FORMATS."""
    return next((name for name in FORMATS if _fits(row, name)), None)


def normalise(raw: RawRow, style: str) -> Sample:
    """The sample a row stands for. Raises RowFault."""
    row = raw.row
    if style == "text":
        if not isinstance(row["text"], str):
            raise RowFault("text as a string", found_text(row["text"]), "write the text itself")
        return Sample(raw.source, raw.origin, row, text=row["text"])
    messages = TO_MESSAGES[style](row)
    if not any(m["role"] == "assistant" for m in messages):
        raise RowFault(
            "at least one assistant turn (there is nothing to learn otherwise)",
            _turns(messages),
            "add the answer",
        )
    return Sample(raw.source, raw.origin, row, messages=messages, tools=tools_of(row.get("tools")))


# ---- recognising ---------------------------------------------------------------------------------


def _fits(row: dict[str, Any], style: str) -> bool:
    has = {key for key, value in row.items() if value is not None}
    if style == "messages":
        return "messages" in has or (
            "conversations" in has and not _sharegpt_like(row["conversations"])
        )
    if style == "sharegpt":
        return "conversations" in has and _sharegpt_like(row["conversations"])
    if style == "alpaca":
        return {"instruction", "output"} <= has
    if style == "prompt_completion":
        return {"prompt", "completion"} <= has
    return "text" in has


def _sharegpt_like(value: Any) -> bool:
    turns = turn_list(value)
    return not (
        isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]
    )


def _unknown(row: dict[str, Any]) -> RowFault:
    looks = "; ".join(f"{name} ({_LOOKS[name]})" for name in FORMATS)
    return RowFault(
        f"one of the formats {looks}", _keys(row), "rename the fields or convert the file"
    )


def _keys(row: dict[str, Any]) -> str:
    return f"the fields {', '.join(map(repr, list(row)[:10]))}" if row else "no fields"


def _turns(messages: list[Message]) -> str:
    return f"turns of {', '.join(m['role'] for m in messages[:8])}" if messages else "no turns"
