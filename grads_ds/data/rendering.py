"""One conversation through the chat template: its text, where the targets lie in it, and what of
the row the template did not carry.

What the row says is checked against the text by `carried`; what is lost is refused, or counted
where `data.dropped_content` says so. Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grads_ds.data.carried import Piece, kind_of, missing
from grads_ds.data.control_tokens import ControlTokens
from grads_ds.data.conversation import Message
from grads_ds.data.formats import Sample
from grads_ds.data.marks import Findings, end_tokens, examine
from grads_ds.data.problems import RowProblem
from grads_ds.data.template import Span, Template
from grads_ds.data.turns import assistant_spans, marked_spans

KINDS_KEPT = 10_000  # kinds of conversations whose twin's findings are remembered
TYPED = "control tokens in texts became text"
AS_TEXT = "tool calls became JSON text, as the chat template knows none"
EMPTY = "empty answers among others are not learned"
# what a template may leave out where data.dropped_content is count
_MAY_BE_LEFT = ("system prompt", "reasoning", "tool schema", "tool call", "tool result")


@dataclass
class Rendered:
    """A rendered conversation: text, character spans of its targets, control tokens that were typed
    (as private characters in the text), and counts of what was left out and what was changed.
    """

    text: str
    spans: list[Span]
    ends: tuple[str, ...] = ()  # tokens that end an answer
    typed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


class Renderer:
    """Renders samples under a tokenizer's chat template. Remembers what earlier rows showed."""

    def __init__(self, tokenizer: Any, dropped_content: str):
        self.tokenizer, self.refuses = tokenizer, dropped_content == "refuse"
        self.control = ControlTokens(tokenizer)
        self.special = tuple(self.control.texts)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._added = tuple(sorted((t for t in added if t.strip()), key=len, reverse=True))
        self.forget()

    def forget(self) -> None:
        """Forget what rows showed of the template, so that what follows depends on none of them."""
        self._templates: dict[bool, tuple[Template, tuple[str, ...]]] = {}
        self._kinds: dict[Any, Findings] = {}

    def render(self, sample: Sample) -> Rendered:
        """The sample under the chat template. Raises RowProblem."""
        template, ends = self._template(bool(sample.tools))
        notes: dict[str, int] = {}
        given = sample.messages or []
        # an empty answer among others teaches nothing but to stop at once
        empty = [not says(m) and _learned(m) for m in given]
        if any(empty):
            notes[EMPTY] = sum(empty)
            given = [m | {"weight": 0} if e else m for m, e in zip(given, empty, strict=True)]
        given, tools, typed = self.control.protect(given, sample.tools)
        if typed:
            notes[TYPED] = typed
        messages = template.as_it_reads(given, tools)
        if not template.knows_calls and messages is not given:
            notes[AS_TEXT] = sum(len(m.get("tool_calls", ())) for m in given)
            given = messages
        text, marks = template.accepted(messages, tools)
        # what went in against what came out
        found = self._findings(template, given, tools)
        # (a twin has every word of the schemas, and no other text to find them in)
        lost = missing(text, given, None if found.rendered else tools, found.lost)
        left_out = self._left_out(lost, found, given)
        if template.marked:
            if found.problem:
                raise found.problem
            spans = marked_spans(text, marks, found.owners, messages, (*self.special, *ends), ends)
        else:
            spans = assistant_spans(
                text,
                messages,
                lambda turns, prompt: template.render(turns, tools, prompt)[0],
                (*self.special, *ends),
                ends,
            )
        return Rendered(text, spans, ends, typed, left_out, notes)

    def _template(self, tools: bool) -> tuple[Template, tuple[str, ...]]:
        if tools not in self._templates:
            source = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
            template = Template(source, self.tokenizer.special_tokens_map)
            eos = self.tokenizer.eos_token
            self._templates[tools] = template, end_tokens(template, self._added, eos)
        return self._templates[tools]

    def _findings(self, template: Template, messages: list[Message], tools: Any) -> Findings:
        if tools or any(m.get("tool_calls") for m in messages):
            return examine(template, messages, tools, self.special)
        kind = kind_of(messages)
        if kind not in self._kinds:
            if len(self._kinds) >= KINDS_KEPT:
                self._kinds.clear()
            self._kinds[kind] = examine(template, messages, tools, self.special)
        return self._kinds[kind]

    def _left_out(
        self, lost: list[Piece], found: Findings, messages: list[Message]
    ) -> dict[str, int]:
        """Of what is lost how much of each kind. Raises RowProblem where it may not be."""
        kinds = {(piece.turn, piece.kind): piece.text for piece in lost}
        kinds = dict.fromkeys(found.lost, "") | kinds
        counts: dict[str, int] = {}
        for (turn, kind), text in sorted(kinds.items()):
            if self.refuses or kind not in _MAY_BE_LEFT:
                of = f" of turn {turn + 1} ({messages[turn]['role']})" if turn >= 0 else ""
                shown = f": {text[:60]!r}" if text else ""
                change = "use a chat template that carries it (model.chat_template)"
                if kind in _MAY_BE_LEFT:
                    change = f"data.dropped_content: count goes on without it, or {change}"
                raise RowProblem(
                    f"the chat template to keep the {kind}{of}",
                    f"that it leaves it out or rewrites it{shown}",
                    change,
                )
            counts[kind] = counts.get(kind, 0) + 1
        return counts


def says(message: Message) -> bool:
    """Whether there is anything in the message: text, reasoning or a call."""
    said = message["content"].strip() or message.get("tool_calls")
    return bool(said or message.get("reasoning_content", "").strip())


def _learned(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get("weight", 1))


def teaches(message: Message) -> bool:
    """Whether the message is an answer with something in it that is to be learned."""
    return _learned(message) and says(message)
