"""The one check of every row: what went in against what the chat template made of it.

Every turn's text and reasoning, the system prompt, tool calls and tool schemas have to appear in
the rendered conversation as given and in order. It is checked twice: in the row's own rendering,
and in that of a twin of the row whose every text is a word that occurs nowhere else, so that
nothing is found by accident. Twins of rows without tools are alike where roles and keys are alike,
so one of each kind is rendered. Blanks around a text are the template's business; a text may stand
there as JSON writes it. Neither marks nor tools are needed for the check. Pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from grads_ds.data.conversation import Message

# what templates take for the borders of reasoning inside a content
TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]")
# a text that JSON writes as it is
_AS_IT_IS = re.compile(r"[ !#-\[\]-~]*")
# values of a schema that say what kind a field is, which templates word in their own way
_KINDS = {"string", "number", "integer", "boolean", "object", "array", "null", "function"}


@dataclass(frozen=True)
class Piece:
    """A text that has to appear: of turn `turn` (0 is the first; -1 are the tools)."""

    turn: int
    kind: str  # system prompt, text, answer, reasoning, tool call, tool result, tool schema
    text: str


_KIND_OF_ROLE = {
    "system": "system prompt",
    "developer": "system prompt",
    "tool": "tool result",
    "assistant": "answer",
}


def pieces_of(number: int, message: Message) -> list[Piece]:
    """Reasoning and content of a turn, in order; the calls are `call_leaves`."""
    kind = _KIND_OF_ROLE.get(message["role"], "text")
    found = []
    if message.get("reasoning_content"):
        found.append(Piece(number, "reasoning", message["reasoning_content"].strip()))
    content = message["content"]
    if kind == "answer" and TAGS.search(content):
        found += [Piece(number, name, text) for name, text in _segments(content)]
    else:
        found.append(Piece(number, kind, content.strip()))
    return [piece for piece in found if piece.text]


def _segments(content: str) -> Iterator[tuple[str, str]]:
    """(kind, text) between the tags of reasoning; before a closing tag there is reasoning."""
    at, opened = 0, False
    for tag in TAGS.finditer(content):
        closing = "/" in tag.group()
        yield "reasoning" if closing or opened else "answer", content[at : tag.start()].strip()
        at, opened = tag.end(), not closing
    yield "reasoning" if opened else "answer", content[at:].strip()


def missing(
    text: str, messages: list[Message], tools: Any, known: frozenset[tuple[int, str]] = frozenset()
) -> list[Piece]:
    """The pieces that are not in `text`, the rendered conversation.

    What is `known` to be lost, as (turn, kind), is not looked for: it could be found by accident,
    where another piece stands.
    """
    lost, spans = _in_order(text, messages, known)
    if lost and messages[0]["role"] in ("system", "developer"):
        # templates may put the leading system prompt into a later turn
        others, spans_ = _in_order(text, messages, known, first=1)
        outside = _without(text, spans_)
        leading = [p for p in pieces_of(0, messages[0]) if _find(outside, p.text, 0) is None]
        if len(others) + len(leading) < len(lost):
            lost, spans = leading + others, spans_
    if tools:
        outside = _without(text, spans)
        lost += [
            Piece(-1, "tool schema", leaf)
            for leaf in dict.fromkeys(leaves(tools, schema=True))
            if _find(outside, leaf, 0) is None
        ]
    return lost


def _in_order(
    text: str, messages: list[Message], known: frozenset[tuple[int, str]], first: int = 0
) -> tuple[list[Piece], list[tuple[int, int]]]:
    lost: list[Piece] = []
    spans: list[tuple[int, int]] = []
    at = 0
    for number in range(first, len(messages)):
        message, begin = messages[number], at
        for piece in pieces_of(number, message):
            if known and (number, piece.kind) in known:
                continue
            span = _find(text, piece.text, at)
            if span is None:
                lost.append(piece)
            else:
                spans.append(span)
                at = span[1]
        # a call may stand before or behind the text of its turn
        for call in message.get("tool_calls") or ():
            end = begin
            for leaf in leaves(call["function"]):
                span = _find(text, leaf, begin)
                if span is None:
                    lost.append(Piece(number, "tool call", leaf))
                else:
                    end = max(end, span[1])
            at = max(at, end)
    return lost, spans


def stands_in(text: str, piece: str) -> bool:
    """Whether a piece is in the text, as it is or as JSON writes it."""
    return _find(text, piece, 0) is not None


def _find(text: str, piece: str, at: int) -> tuple[int, int] | None:
    """Where a piece stands first at or behind `at`, as it is or as JSON writes it.

    The first of all forms: a later text may hold the form that this piece has not.
    """
    place, length = text.find(piece, at), len(piece)
    for ascii_only in () if _AS_IT_IS.fullmatch(piece) else (False, True):
        form = json.dumps(piece, ensure_ascii=ascii_only)[1:-1]
        if form == piece:
            continue
        # of what stands before the place found so far
        end = len(text) if place < 0 else place + len(form) - 1
        if (earlier := text.find(form, at, end)) >= 0:
            place, length = earlier, len(form)
    return (place, place + length) if place >= 0 else None


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    parts, at = [], 0
    for start, end in spans:
        parts.append(text[at:start])
        at = max(at, end)
    return "\n".join([*parts, text[at:]])


def leaves(value: Any, schema: bool = False) -> Iterator[str]:
    """Names and values that a call's function, or a list of schemas, is made of, as texts.

    Of a schema the words of JSON Schema itself are left out: templates have their own for them.
    """
    if isinstance(value, dict):
        arguments = not schema and "arguments" in value and "name" in value
        for key, item in value.items():
            named = isinstance(item, dict) and key in ("properties", "arguments")
            if not schema and not arguments:
                yield str(key)
            if schema and named:
                yield from (str(name) for name in item)
            if not (schema and key == "type"):
                yield from leaves(item, schema)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, schema)
    elif isinstance(value, str):
        if value.strip() and not (schema and value in _KINDS):
            yield value.strip()
    elif not schema and value is not None and not isinstance(value, bool):
        yield json.dumps(value)


# ---- twins ---------------------------------------------------------------------------------------


def kind_of(messages: list[Message]) -> tuple[Any, ...]:
    """What twins that are alike have in common: the roles, the keys, which texts there are."""
    return tuple(
        (
            m["role"],
            tuple(key for key in m if key != "role"),
            bool(m["content"].strip()),
            tuple(TAGS.findall(m["content"])) if m["role"] == "assistant" else (),
        )
        for m in messages
    )


def twin_of(messages: list[Message], tools: Any) -> tuple[list[Message], Any]:
    """The conversation with a word of its own in place of every text and of every name."""
    words = (f"Wq{number:05d}z" for number in count())
    known: dict[str, str] = {}

    def word(text: str, shared: bool = False) -> str:
        if not text.strip():
            return text
        return known.setdefault(text, next(words)) if shared else next(words)

    def renamed(value: Any, schema: bool) -> Any:
        if isinstance(value, dict):
            return {
                key: _properties(item, renamed, word)
                if key in ("properties", "arguments") and isinstance(item, dict)
                else item
                if key == "type"
                else renamed(item, schema)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [renamed(item, schema) for item in value]
        return word(value, True) if isinstance(value, str) and value not in _KINDS else value

    twins = []
    for message in messages:
        twin = dict(message)
        if message["role"] == "assistant" and TAGS.search(message["content"]):
            parts = re.split(f"({TAGS.pattern})", message["content"])
            twin["content"] = "".join(p if i % 2 else _kept(p, word) for i, p in enumerate(parts))
        else:
            twin["content"] = _kept(message["content"], word)
        if "reasoning_content" in message:
            twin["reasoning_content"] = word(message["reasoning_content"])
        if message.get("tool_calls"):
            twin["tool_calls"] = [
                call | {"function": renamed(call["function"], False)}
                for call in message["tool_calls"]
            ]
        twins.append(twin)
    return twins, renamed(tools, True) if tools else tools


def _kept(text: str, word: Any) -> str:
    """A word with the blanks that surround the text."""
    bare = text.strip()
    return text.replace(bare, word(bare)) if bare else text


def _properties(fields: dict[str, Any], renamed: Any, word: Any) -> dict[str, Any]:
    return {word(name, True): renamed(item, True) for name, item in fields.items()}
