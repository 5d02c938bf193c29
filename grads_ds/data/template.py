"""A model's chat template, rendered: messages and tools -> text, and the character spans of its
`{% generation %}` marks where it has any.

transformers' own renderer does it; what differs is said here: which form of a tool call the
template can write, and that a template without tool calls gets them as JSON text.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grads_ds.data.conversation import Message
from grads_ds.data.problems import RowProblem

SECONDS = 30.0  # for one conversation; the longest real ones take a few milliseconds
LOOKS = 30  # at the clock in that time; a call of the system for each conversation would cost more
BYTES = 2 * 2**30  # of memory beyond what the process has, likewise
Span = tuple[int, int]  # [start, end) in characters
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class EndlessTemplateError(BaseException):
    """A template was at work for SECONDS. No `Exception`: what a template itself raises is tried
    again in other ways, which would take as long.
    """


_bounded = False
_end = 0.0  # by time.monotonic, of what is bounded now


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes longer than SECONDS, or wants more than BYTES (MemoryError); not in a thread,
    which gets no signal.

    Inside of another one the time begins anew and the memory does not: that around many rows makes
    those of the rows cheap.
    """
    global _bounded, _end
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _end = time.monotonic() + SECONDS
    if _bounded:
        yield
        return

    def late(number: int, frame: Any) -> None:
        global _end
        if time.monotonic() >= _end:
            _end = math.inf  # once
            raise EndlessTemplateError

    before, memory = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(FileNotFoundError):  # no Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * resource.getpagesize() + BYTES
        if memory[0] == resource.RLIM_INFINITY or allowed < memory[0]:
            resource.setrlimit(resource.RLIMIT_AS, (allowed, memory[1]))
    _bounded = True
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS / LOOKS)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _bounded = False


class Template:
    """One chat template with the tokenizer's special tokens. Holds what was found out about it."""

    def __init__(self, source: str, special_tokens: dict[str, Any]):
        self.source, self.special_tokens = source, special_tokens
        self.marked = bool(_MARKS.search(source))
        self.knows_calls = "tool_calls" in source
        self.arguments_as_text: bool | None = None  # None until a row with a call was rendered

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and its marks; `prompt` adds the generation prompt.

        Raises whatever the template raises, and EndlessTemplateError after SECONDS.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        with bounded():
            texts, marks = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.marked,
                **self.special_tokens,
            )
        return texts[0], marks[0] if self.marked else []

    def accepted(self, messages: Sequence[Message], tools: Any) -> tuple[str, list[Span]]:
        """`render` of a row: what the template refuses is the row's problem."""
        try:
            return self.render(messages, tools)
        # templates raise their own errors on roles and orders they do not know
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "no reason given")[:200]
            raise RowProblem(
                "turns the chat template accepts",
                f"that it refuses them ({type(error).__name__}: {reason})",
                "reorder the turns or set model.chat_template",
            ) from None

    def as_it_reads(self, messages: list[Message], tools: Any) -> list[Message]:
        """The messages with tool calls in the form that the template can write."""
        if not any(m.get("tool_calls") for m in messages):
            return messages
        if not self.knows_calls:
            return [_calls_as_text(m) for m in messages]
        if self.arguments_as_text is None:
            self.arguments_as_text = self._wants_text(messages, tools)
        if self.arguments_as_text:
            return [_arguments_as_text(m) for m in messages]
        return messages

    def _wants_text(self, messages: list[Message], tools: Any) -> bool:
        """Whether arguments as an object make it fail or write Python's notation, and text not."""

        def written(form: list[Message]) -> str | None:
            try:
                return self.render(form, tools)[0]
            except Exception:
                return None

        probe = [_with_arguments(m, {"grads_key": "grads_value"}) for m in messages]
        plain = written(probe)
        if plain is not None and "'grads_key'" not in plain:
            return False
        text = written([_arguments_as_text(m) for m in probe])
        return text is not None and '"grads_key"' in text


def _with_arguments(message: Message, arguments: Any) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": arguments}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _arguments_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _calls_as_text(message: Message) -> Message:
    """The call as JSON text, rather than a turn that silently says nothing."""
    if not message.get("tool_calls"):
        return message
    calls = [_json(call["function"]) for call in message["tool_calls"]]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": content
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
