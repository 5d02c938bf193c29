"""What the twin of a conversation shows of a chat template: which turns it loses, whose answer each
`{% generation %}` mark holds, and which token ends an answer.

See `carried` for twins. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.data.carried import TAGS, missing, pieces_of, twin_of
from grads_ds.data.conversation import Message
from grads_ds.data.problems import RowProblem
from grads_ds.data.template import Span, Template

_FIX = "correct the generation marks of the template, or set model.chat_template"


@dataclass(frozen=True)
class Findings:
    """Of every conversation of one kind: whether its twin could be rendered, (turn, kind) of what
    is lost, the assistant turns in each mark (None where they could not be told), and what is wrong
    with the marks.
    """

    rendered: bool = False
    lost: frozenset[tuple[int, str]] = frozenset()
    owners: tuple[tuple[int, ...], ...] | None = None
    problem: RowProblem | None = None


def examine(
    template: Template, messages: list[Message], tools: Any, special: tuple[str, ...]
) -> Findings:
    """Render the twin of a conversation and look for its words."""
    twins, schemas = twin_of(messages, tools)
    try:
        text, marks = template.render(template.as_it_reads(twins, schemas), schemas)
    except Exception:  # a template that looks into texts may refuse the twin's; the row's own
        return Findings()  # rendering is checked all the same
    read = template.as_it_reads(twins, schemas) if not template.knows_calls else twins
    lost = frozenset((piece.turn, piece.kind) for piece in missing(text, read, schemas))
    if not template.marked:
        return Findings(True, lost)
    try:
        return Findings(True, lost, _owners(template, read, schemas, text, marks, special))
    except RowProblem as problem:
        return Findings(True, lost, None, problem)


def _owners(
    template: Template,
    twins: list[Message],
    tools: Any,
    text: str,
    marks: list[Span],
    special: tuple[str, ...],
) -> tuple[tuple[int, ...], ...]:
    places = {
        (piece.turn, piece.kind, at)
        for number, message in enumerate(twins)
        for piece in pieces_of(number, message)
        if (at := text.find(piece.text)) >= 0
    }
    owners: list[tuple[int, ...]] = []
    answers = [n for n, m in enumerate(twins) if m["role"] == "assistant"]
    for start, end in marks:
        inside = sorted({turn for turn, _, at in places if start <= at < end})
        if strange := [turn for turn in inside if turn not in answers]:
            found = f"turn {strange[0] + 1}, of role {twins[strange[0]]['role']}, in one of them"
            raise RowProblem("generation marks around answers alone", found, _FIX)
        if not inside:  # an empty answer or one of calls alone: the next one in order
            later = [n for n in answers if n > (owners[-1][-1] if owners and owners[-1] else -1)]
            inside = later[:1]
        owners.append(tuple(inside))
        if inside:
            _check_begin(template, twins, tools, inside[0], text, (start, end), special)
    for turn, kind, at in sorted(places):
        if kind == "answer" and not any(start <= at < end for start, end in marks):
            found = f"the answer of turn {turn + 1} outside"
            raise RowProblem("generation marks around every answer", found, _FIX)
    return tuple(owners)


def _check_begin(
    template: Template,
    twins: list[Message],
    tools: Any,
    turn: int,
    text: str,
    mark: Span,
    special: tuple[str, ...],
) -> None:
    """Raise RowProblem when a mark begins inside the header that the generation prompt writes."""
    try:
        prompted = template.render(template.as_it_reads(twins[:turn], tools), tools, True)[0]
    except Exception:
        return
    given = TAGS.sub("", text[mark[0] : len(prompted)])
    if text.startswith(prompted) and any(token in given for token in special):
        found = f"the header of turn {turn + 1} in one of them: {given!r}"
        raise RowProblem("generation marks that begin with the answer", found, _FIX)


def end_tokens(template: Template, special: tuple[str, ...], eos: str | None) -> tuple[str, ...]:
    """The tokens that end an answer under the template: what follows an answer and a call when they
    come last, and the tokenizer's EOS.
    """
    asked: Message = {"role": "user", "content": "Wq1z"}
    said: Message = {"role": "assistant", "content": "Wq2z"}
    function = {"name": "Wq2z", "arguments": {}}
    call = said | {"content": "", "tool_calls": [{"type": "function", "function": function}]}
    found: Sequence[str | None] = [
        _follows(template, turns, special)
        for turns in (
            [asked, said],
            [{"role": "system", "content": "Wq0z"}, asked, said],
            *([[asked, call]] if template.knows_calls else ()),
        )
    ]
    return tuple(dict.fromkeys(token for token in (*found, eos) if token))


def _follows(template: Template, turns: list[Message], special: tuple[str, ...]) -> str | None:
    try:
        text = template.render(template.as_it_reads(turns, None))[0]
    except Exception:
        return None
    tail = text.rpartition("Wq2z")[2]
    places = [(tail.index(s), -len(s), s) for s in special if s in tail]
    return min(places)[2] if places else None
