"""Where the assistant's words lie in a rendered conversation: character spans, from a template's
marks or without them.

Pure functions over texts and messages; nothing is tokenised here. A template that drops, rewrites
or reorders assistant turns (as those that remove earlier reasoning) cannot be masked rightly and
raises `RowFault` instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from grads_ds.config.errors import UserError
from grads_ds.data.messages import Message
from grads_ds.data.problems import RowFault

Span = tuple[int, int]  # [start, end) in characters
Render = Callable[[list[Message], bool], str]  # (messages, add_generation_prompt) -> text
# end tokens a tokenizer may know as plain text only
_END_MARK = re.compile(r"(<\|[^|<>]+\|>|</s>|<[\w]+_of_[\w]+>)\Z")
_STAND_IN = "\u2042stand-in\u2042"
_USE_MARKS = (
    "use a chat template with {% generation %} marks (model.chat_template), or end the row there"
)


def marked_spans(
    text: str, marks: list[Span], messages: list[Message], eos: str | None
) -> list[Span]:
    """Spans of the template's own `{% generation %}` blocks, each with the EOS token that follows
    it directly.

    Raises RowFault when weights are given and the blocks cannot be told apart by turn.
    """
    if not any(end > start for start, end in marks):
        raise RowFault(
            "the chat template's generation marks to hold the answers",
            "empty marks",
            "mend the template",
        )
    spans = []
    for start, end in marks:
        open_ended = eos and text.startswith(eos, end) and not text[start:end].endswith(eos)
        spans.append((start, end + len(eos) if eos and open_ended else end))
    turns = [m for m in messages if m["role"] == "assistant"]
    if all(m.get("weight", 1) for m in turns):
        return spans
    if len(spans) != len(turns):
        found = f"{len(spans)} generation marks for {len(turns)} assistant turns"
        raise RowFault(
            "one generation mark per assistant turn, to tell which have weight 0",
            found,
            "mend the template",
        )
    return [span for span, m in zip(spans, turns, strict=True) if m.get("weight", 1)]


def assistant_spans(
    text: str, messages: list[Message], render: Render, special: tuple[str, ...]
) -> list[Span]:
    """Spans of the assistant turns in `text` = render(messages, False), for a template without
    marks.

    For each turn the conversation up to it is rendered with the generation prompt (where the answer
    begins) and with the answer (where it ends). Both must be beginnings of `text`; a turn for which
    they are not is located by rendering the conversation with a stand-in for its content. Blanks
    after the end-of-turn token are no targets: the model never has to write them.
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
            span = _by_stand_in(text, until, messages, k, render, special)
        span = _trimmed(text, span, special)
        said = text[span[0] : span[1]]
        if not message.get("tool_calls") and _no_blanks(message["content"]) not in _no_blanks(said):
            raise RowFault(
                f"the chat template to keep turn {k + 1} as it stands",
                "a template that leaves out or rewrites part of it (earlier reasoning, for"
                " instance)",
                _USE_MARKS,
            )
        if spans and span[0] < spans[-1][1]:
            raise RowFault(
                "assistant turns in order", f"turn {k + 1} before an earlier one", _USE_MARKS
            )
        spans.append(span)
    return spans


def _attempt(render: Render, messages: list[Message], prompt: bool) -> str | None:
    try:
        return render(messages, prompt)
    except UserError:
        raise  # it takes too long
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
) -> Span:
    """Span of turn k from the rendering with a stand-in for its content, up to the end-of-turn
    token behind it: a special token that also ends `until`, the conversation up to that turn (where
    it renders).
    """
    changed = _attempt(
        render, [*messages[:k], messages[k] | {"content": _STAND_IN}, *messages[k + 1 :]], False
    )
    if changed is not None and changed.count(_STAND_IN) == 1 and messages[k]["content"]:
        begin, rest = changed.index(_STAND_IN), changed.partition(_STAND_IN)[2]
        end = len(text) - len(rest)
        if begin <= end and text[:begin] == changed[:begin] and text[end:] == rest:
            mark = next((s for s in special if rest.lstrip().startswith(s)), None)
            if mark and (until is None or until.rstrip().endswith(mark)):
                return begin, end + len(rest) - len(rest.lstrip()) + len(mark)
    raise RowFault(
        f"a chat template in which turn {k + 1} can be found again",
        "one that renders it differently once more turns follow",
        _USE_MARKS,
    )


def _trimmed(text: str, span: Span, special: tuple[str, ...]) -> Span:
    said = text[span[0] : span[1]].rstrip()
    return (
        (span[0], span[0] + len(said)) if said.endswith(special) or _END_MARK.search(said) else span
    )


def _no_blanks(text: str) -> str:
    return "".join(text.split())
