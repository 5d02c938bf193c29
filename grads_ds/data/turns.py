"""Where the answers to be learned lie in a rendered conversation: character spans, from a
template's marks or without them.

Pure functions over texts and messages; nothing is tokenised here. A template that rewrites or
reorders assistant turns cannot be masked rightly and raises `RowProblem` instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from grads_ds.data.carried import pieces_of, stands_in
from grads_ds.data.conversation import Message
from grads_ds.data.problems import RowProblem
from grads_ds.data.template import Span

Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text
Owners = tuple[tuple[int, ...], ...]
# end tokens a tokenizer may know as plain text only
_END_MARK = re.compile(r"(<\|[^|<>]+\|>|</s>|<[\w]+_of_[\w]+>)\Z")
_STAND_IN = "\u2042stand-in\u2042"
_USE_MARKS = (
    "use a chat template with {% generation %} marks (model.chat_template), or end the row there"
)


def marked_spans(
    text: str,
    marks: list[Span],
    owners: Owners | None,
    messages: list[Message],
    special: tuple[str, ...],
    ends: tuple[str, ...],
) -> list[Span]:
    """Spans of the template's own `{% generation %}` blocks whose answers are to be learned, each
    with the token that ends it, which may follow the block.

    Args:
        text: the rendered conversation.
        marks: the blocks' spans in it.
        owners: the turns whose answers each block holds; None where they could not be told.
        messages: the conversation.
        special: the tokenizer's special tokens.
        ends: tokens that end an answer.

    Raises RowProblem when the blocks cannot be told apart by turn.
    """
    if not any(end > start for start, end in marks):
        raise RowProblem(
            "the chat template's generation marks to hold the answers",
            "empty marks",
            "correct the template",
        )
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    everything = all(messages[n].get("weight", 1) for n in turns)
    if owners is None:
        if len(marks) != len(turns) and not everything:
            raise RowProblem(
                "one generation mark per assistant turn, to tell which are not to be learned",
                f"{len(marks)} generation marks for {len(turns)} assistant turns",
                "correct the template",
            )
        owners = tuple((n,) for n in turns) if len(marks) == len(turns) else ((),) * len(marks)
    if len(owners) != len(marks):
        raise RowProblem(
            "generation marks that follow the turns",
            f"{len(marks)} marks, and {len(owners)} for other texts of the same turns",
            "correct the template",
        )
    spans = []
    for (start, end), mine in zip(marks, owners, strict=True):
        learned = {bool(messages[n].get("weight", 1)) for n in mine} or {everything}
        if len(learned) > 1:
            raise RowProblem(
                "turns that one generation mark holds to be learned or not alike",
                f"both among turns {', '.join(str(n + 1) for n in mine)}",
                "correct the template",
            )
        if end > start and learned == {True}:
            spans.append(_with_end(text, (start, end), special, ends))
    return spans


def _with_end(text: str, span: Span, special: tuple[str, ...], ends: tuple[str, ...]) -> Span:
    start, end = _trimmed(text, span, special)
    if text[start:end].endswith(special):
        return start, end
    follows = end + len(text[end:]) - len(text[end:].lstrip())
    token = next((token for token in ends if text.startswith(token, follows)), None)
    return (start, follows + len(token)) if token else span


def assistant_spans(
    text: str,
    messages: list[Message],
    render: Render,
    special: tuple[str, ...],
    ends: tuple[str, ...] = (),
) -> list[Span]:
    """Spans of the assistant turns in `text` = render(messages, False), for a template without
    marks.

    For each turn the conversation up to it is rendered with the generation prompt (where the answer
    begins) and with the answer (where it ends). Both must be beginnings of `text`; a turn for which
    they are not is located by rendering the conversation with a stand-in for its content. Blanks
    after the end-of-turn token are no targets: the model never has to write them.

    Args:
        text: the rendered conversation.
        messages: the conversation.
        render: renders a conversation, with or without the generation prompt.
        special: the tokenizer's special tokens.
        ends: tokens that end an answer; a span ends behind the first of them.

    Raises RowProblem for a turn that cannot be found again.
    """
    spans: list[Span] = []
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        until = text if k == len(messages) - 1 else _attempt(render, messages[: k + 1], False)
        start = None
        if until is not None and text.startswith(until):
            start = _begin(until, messages[: k + 1], render)
        if start is not None and until is not None:
            span = (start, len(until))
        else:
            span = _by_stand_in(text, until, messages, k, render, special, ends)
        answers = [piece.text for piece in pieces_of(k, message) if piece.kind == "answer"]
        span = _to_first_end(text, _trimmed(text, span, special), answers, ends)
        said = text[span[0] : span[1]]
        if not all(stands_in(said, answer) for answer in answers):
            raise RowProblem(
                f"the chat template to keep turn {k + 1} as it stands",
                "a template that rewrites part of it",
                _USE_MARKS,
            )
        if spans and span[0] < spans[-1][1]:
            raise RowProblem(
                "assistant turns in order", f"turn {k + 1} before an earlier one", _USE_MARKS
            )
        spans.append(span)
    return spans


def _attempt(render: Render, messages: list[Message], prompt: bool) -> str | None:
    try:
        return render(messages, prompt)
    except Exception:  # a template may refuse part of a conversation that it accepts as a whole
        return None


def _begin(until: str, turns: list[Message], render: Render) -> int | None:
    """Where the answer begins in `until`, the rendering of `turns` whose last is the answer; None
    when it cannot be told.
    """
    prompted = _attempt(render, turns[:-1], True)
    if (
        prompted is not None
        and until.startswith(prompted)
        and prompted != _attempt(render, turns[:-1], False)
    ):
        return len(prompted)
    # no generation prompt in this template: the text before the content is what two different
    # contents share
    other = _attempt(render, [*turns[:-1], turns[-1] | {"content": _STAND_IN}], False)
    if other is None or other.count(_STAND_IN) != 1 or turns[-1].get("tool_calls"):
        return None
    begin = other.index(_STAND_IN)
    return begin if until[:begin] == other[:begin] else None


def _by_stand_in(
    text: str,
    until: str | None,
    messages: list[Message],
    k: int,
    render: Render,
    special: tuple[str, ...],
    ends: tuple[str, ...],
) -> Span:
    """Span of turn k from the rendering with a stand-in for its content, up to the end-of-turn
    token behind it: one of `ends`, or a special token that also ends `until`, the conversation up
    to that turn (where it renders).
    """
    changed = _attempt(
        render, [*messages[:k], messages[k] | {"content": _STAND_IN}, *messages[k + 1 :]], False
    )
    if changed is not None and changed.count(_STAND_IN) == 1 and messages[k]["content"]:
        begin, rest = changed.index(_STAND_IN), changed.partition(_STAND_IN)[2]
        end = len(text) - len(rest)
        if begin <= end and text[:begin] == changed[:begin] and text[end:] == rest:
            mark = next((s for s in special if rest.lstrip().startswith(s)), None)
            if mark and (mark in ends or until is None or until.rstrip().endswith(mark)):
                return begin, end + len(rest) - len(rest.lstrip()) + len(mark)
    raise RowProblem(
        f"a chat template in which turn {k + 1} can be found again",
        "one that renders it differently once more turns follow",
        _USE_MARKS,
    )


def _to_first_end(text: str, span: Span, answers: list[str], ends: tuple[str, ...]) -> Span:
    """The span cut behind the first end token that follows the answer."""
    said = text[span[0] : span[1]]
    if not answers or (at := said.rfind(answers[-1])) < 0:
        return span
    behind = at + len(answers[-1])
    found = [place + len(token) for token in ends if (place := said.find(token, behind)) >= 0]
    return (span[0], span[0] + min(found)) if found else span


def _trimmed(text: str, span: Span, special: tuple[str, ...]) -> Span:
    said = text[span[0] : span[1]].rstrip()
    return (
        (span[0], span[0] + len(said)) if said.endswith(special) or _END_MARK.search(said) else span
    )
