"""Samples -> token ids and labels: the one place that says which tokens the loss is on.

Reads a tokenizer folder (or hub id) and, when configured, a chat template file; writes nothing.
Probe, SFT and evaluation all use what stands here:

- chat rows: rendered by the model's own chat template; targets are the assistant turns with the
token that
  ends them (so that the model learns to stop), and nothing else;
- text rows: tokenised as the tokenizer does it (with the BOS/EOS it adds); every token is a target;
- `labels` are aligned with `input_ids`, IGNORE where a token is no target. The model shifts them:
the loss at
  position t is that of labels[t + 1], so labels[0] never counts and `num_target_tokens` is the
  count over labels[1:].

Where the assistant turns lie is taken from the template's `{% generation %}` marks, else derived by
`turns.assistant_spans`. transformers (and with it torch) is imported when a tokenizer is loaded,
not before.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.config.errors import UserError, problem
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.formats import Sample
from grads_ds.data.messages import Message
from grads_ds.data.problems import RowFault
from grads_ds.data.turns import Span, assistant_spans, marked_spans

TEMPLATE_SECONDS = 30.0  # one row; the longest real conversations take a few milliseconds
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample. `dropped` names the reason when it cannot be used; `cut` is the number
    of tokens beyond `max_length` that are not in it.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    dropped: str | None = None


def num_target_tokens(labels: Sequence[int]) -> int:
    """Tokens the loss is on: labels after the first that are not IGNORE (the first token has no
    context).
    """
    return sum(label != IGNORE_INDEX for label in labels[1:])


@contextlib.contextmanager
def _time_limit(seconds: float, origin: str) -> Iterator[None]:
    """Ends what takes longer with UserError; not in a thread, which gets no signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: Any) -> None:
        wanted = f"a template that renders a row within {seconds:g} s"
        found = f"one that had not rendered {origin}"
        raise UserError(problem("model.chat_template", wanted, found, "simplify its loops"))

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Encoder:
    """Turns samples into `Encoded`. Holds the tokenizer and what is worth knowing of it once."""

    def __init__(self, tokenizer: Any, max_length: int, overlong: str = "truncate"):
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
            tokenizer.all_special_tokens
        )
        self.special = tuple(sorted(special, key=len, reverse=True))

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | RowFault]:
        """One result per sample, in order; a RowFault where the template cannot render the sample
        or would mislabel it.
        """
        results: list[Encoded | RowFault | None] = [None] * len(samples)
        texts: list[str] = []
        chats: list[tuple[int, list[Span]]] = []
        for i, sample in enumerate(samples):
            if sample.messages is None:
                results[i] = self._text(sample.text or "")
            elif not any(_teaches(m) for m in sample.messages):
                results[i] = Encoded([], [], dropped="every answer is empty")
            else:
                try:
                    text, spans = self.render(sample)
                except RowFault as fault:
                    results[i] = fault
                    continue
                texts.append(text)
                chats.append((i, spans))
        if texts:
            batch = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,  # lengths are data.max_length's business
            )
            for (i, spans), ids, offsets in zip(
                chats, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                results[i] = self._fit(ids, _labels(ids, offsets, spans))
        return results  # type: ignore[return-value]

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        """The sample's text under the chat template and the character spans of its targets. Raises
        RowFault.
        """
        template = self.tokenizer.get_chat_template(tools=sample.tools)
        messages = [
            m if "tool_calls" in template else _calls_as_text(m) for m in sample.messages or []
        ]
        marked = bool(_MARKS.search(template))

        def rendered(turns: list[Message], prompt: bool = False) -> tuple[str, list[Span]]:
            from transformers.utils.chat_template_utils import render_jinja_template

            with _time_limit(TEMPLATE_SECONDS, sample.origin):
                texts, marks = render_jinja_template(
                    conversations=[turns],
                    tools=sample.tools,
                    chat_template=template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=marked,
                    **self.tokenizer.special_tokens_map,
                )
            return texts[0], marks[0] if marked else []

        try:
            text, marks = rendered(messages)
        except UserError:
            raise  # the next row would take as long
        # templates raise their own errors on roles and orders they do not know
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "no reason given")[:200]
            raise RowFault(
                "turns the chat template accepts",
                f"that it refuses them ({type(error).__name__}: {reason})",
                "reorder the turns or set model.chat_template",
            ) from None
        if marked:
            return text, marked_spans(text, marks, messages, self.tokenizer.eos_token)
        return text, assistant_spans(
            text, messages, lambda turns, prompt: rendered(turns, prompt)[0], self.special
        )

    def _text(self, text: str) -> Encoded:
        if not text.strip():
            return Encoded([], [], dropped="empty text")
        ids = self.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
        return self._fit(ids, list(ids))

    def _fit(self, ids: list[int], labels: list[int]) -> Encoded:
        if num_target_tokens(labels) == 0:
            return Encoded([], [], dropped="no target token")
        if len(ids) <= self.max_length:
            return Encoded(ids, labels)
        if self.overlong == "drop":
            return Encoded([], [], dropped="longer than max_length")
        cut = len(ids) - self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if num_target_tokens(labels) == 0:
            return Encoded([], [], dropped="no target left within max_length")
        return Encoded(ids, labels, cut)


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> list[int]:
    """A token is a target when it holds at least one character of a span."""
    labels, spans, at, before = [IGNORE_INDEX] * len(ids), sorted(spans), 0, 0
    for i, (start, end) in enumerate(offsets):
        # byte-level tokenizers trim blanks off; such a token begins where the last one ended
        if start == end:
            start = min(before, start)
        before = max(before, end)
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        if at < len(spans) and start < spans[at][1] and end > spans[at][0]:
            labels[i] = ids[i]
    return labels


def _teaches(message: Message) -> bool:
    """Whether the message is an answer with something in it that is to be learnt."""
    said = message["content"].strip() or message.get("tool_calls")
    return message["role"] == "assistant" and bool(said) and bool(message.get("weight", 1))


def _calls_as_text(message: Message) -> Message:
    """For templates that know no tool calls: the call as JSON text, rather than a turn that
    silently says nothing.
    """
    if not message.get("tool_calls"):
        return message
    calls = [
        json.dumps(call.get("function", call), ensure_ascii=False) for call in message["tool_calls"]
    ]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": content
    }
