"""Samples -> token ids and labels: the one place that says which tokens the loss is on.

Probe, SFT and evaluation all use what stands here:

- chat rows: rendered by the model's own chat template; targets are the assistant turns that are to
  be learned, each with the token that ends it (so that the model learns to stop), and nothing else;
- text rows: tokenised as the tokenizer does it (with the BOS/EOS it adds); every token is a target;
  of a prompt and a completion as text the completion and the EOS token behind it;
- `labels` are aligned with `input_ids`, IGNORE_INDEX where a token is no target. The model shifts
  them: the loss at position t is that of labels[t + 1], so labels[0] never counts and
  `num_target_tokens` is the count over labels[1:].

Where the answers lie is taken from the template's `{% generation %}` marks, else derived by
`turns.assistant_spans`; whether the template kept what the row says is checked by `carried`.
transformers (and with it torch) is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.formats import Sample
from grads_ds.data.problems import RowProblem
from grads_ds.data.rendering import Rendered, Renderer, says, teaches
from grads_ds.data.template import Span, bounded

ENDLESS = "answers end without a token that stops generation"


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample. `dropped` names the reason when it cannot be used; `cut` is the number
    of tokens beyond `max_length` that are not in it; `ends` are the tokens that end its answers;
    `left_out` and `notes` count what the template did not carry and what was changed.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    dropped: str | None = None
    ends: tuple[int, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


def num_target_tokens(labels: Sequence[int]) -> int:
    """Tokens the loss is on: labels after the first that are not IGNORE_INDEX (the first token has
    no context).
    """
    rest = list(labels[1:])
    return len(rest) - rest.count(IGNORE_INDEX)


class Encoder:
    """Turns samples into `Encoded`. Holds the tokenizer and what is worth knowing of it once."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        overlong: str = "truncate",
        dropped_content: str = "refuse",
    ):
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.renderer = Renderer(tokenizer, dropped_content)
        self._stops: dict[tuple[str, ...], set[int]] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | RowProblem]:
        """One result per sample, in order; a RowProblem where the template cannot render the
        sample, loses part of it, or would mislabel it.
        """
        results: list[Encoded | RowProblem | None] = [None] * len(samples)
        chats: list[tuple[int, Rendered]] = []
        with bounded():
            for i, sample in enumerate(samples):
                found: Rendered | Encoded | RowProblem
                try:
                    found = self._rendered(sample)
                except RowProblem as problem:
                    found = problem
                if isinstance(found, Rendered):
                    chats.append((i, found))
                else:
                    results[i] = found
        for (i, rendered), (ids, offsets) in zip(
            chats, self._tokenise([rendered.text for _, rendered in chats]), strict=True
        ):
            try:
                results[i] = self._chat(rendered, ids, offsets, rendered.spans)
            except RowProblem as problem:
                results[i] = problem
        return results  # type: ignore[return-value]

    def _rendered(self, sample: Sample) -> Rendered | Encoded:
        """A chat that is to be tokenised with others, or what needs no such step."""
        if sample.messages is None:
            return self._text(sample.text or "", sample.context)
        if not any(teaches(m) for m in sample.messages):
            weighted = any(says(m) for m in sample.messages if m["role"] == "assistant")
            reason = "no answer is to be learned" if weighted else "every answer is empty"
            return Encoded([], [], dropped=reason)
        rendered = self.renderer.render(sample)
        if not rendered.typed:
            return rendered
        ids, offsets, spans = self.renderer.control.encode(rendered.text, rendered.spans)
        return self._chat(rendered, ids, offsets, spans)

    def _tokenise(self, texts: list[str]) -> Iterator[tuple[list[int], list[Span]]]:
        if not texts:
            return iter(())
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,  # lengths are data.max_length's business
        )
        offsets = (encoding.offsets for encoding in batch.encodings)
        return zip(batch["input_ids"], offsets, strict=True)

    def _chat(
        self, rendered: Rendered, ids: list[int], offsets: list[Span], spans: list[Span]
    ) -> Encoded:
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise RowProblem("one BOS token", "two at the beginning", "correct the chat template")
        labels, last = _labels(ids, offsets, spans)
        stops = self._stops_of(rendered.ends)
        ends = [ids[i] for i in last if ids[i] in stops and i < self.max_length]
        notes = dict(rendered.notes)
        if endless := sum(ids[i] not in stops for i in last):
            notes[ENDLESS] = endless
        return self._fit(ids, labels, tuple(ends), rendered.left_out, notes)

    def _stops_of(self, ends: tuple[str, ...]) -> set[int]:
        """Ids that can end an answer: special tokens, and those that the template ends with."""
        if ends not in self._stops:
            known = self.tokenizer.get_vocab()
            of_template = {known[end] for end in ends if end in known}
            self._stops[ends] = of_template | set(self.renderer.control.ids.values())
        return self._stops[ends]

    def _text(self, text: str, context: int) -> Encoded:
        if not text.strip():
            return Encoded([], [], dropped="empty text")
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        batch = self.tokenizer(
            text, return_attention_mask=False, return_offsets_mapping=bool(context), verbose=False
        )
        ids = list(batch["input_ids"])
        if bos is not None and bos != eos and ids[:2] == [bos, bos]:
            raise RowProblem(
                "text that begins with at most one BOS token",
                "its own and the one that the tokenizer adds",
                f"remove {self.tokenizer.bos_token} from the text",
            )
        if not context:
            return self._fit(ids, list(ids), tuple(ids[-1:]) if ids[-1] == eos else ())
        labels, _ = _labels(ids, batch["offset_mapping"], [(context, len(text))])
        if eos is not None and ids[-1] != eos:
            ids.append(eos)
            labels.append(eos)
        elif eos is not None:
            labels[-1] = eos
        return self._fit(ids, labels, (eos,) if eos is not None else ())

    def _fit(
        self,
        ids: list[int],
        labels: list[int],
        ends: tuple[int, ...],
        left_out: dict[str, int] | None = None,
        notes: dict[str, int] | None = None,
    ) -> Encoded:
        if num_target_tokens(labels) == 0:
            return Encoded([], [], dropped="no target token")
        said = left_out or {}, notes or {}
        if len(ids) <= self.max_length:
            return Encoded(ids, labels, 0, None, ends, *said)
        if self.overlong == "drop":
            return Encoded([], [], dropped="longer than max_length")
        cut = len(ids) - self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if num_target_tokens(labels) == 0:
            return Encoded([], [], dropped="no target left within max_length")
        return Encoded(ids, labels, cut, None, ends, *said)


def _labels(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]
) -> tuple[list[int], list[int]]:
    """(labels; where the last token of each span is): a token is a target when it holds at least
    one character of a span.

    Byte-level tokenizers trim blanks off; a token that is left without characters begins where the
    one before it ended. Offsets go up, so that the tokens of a span are found by bisection.
    """
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    if stops != sorted(stops) or starts != sorted(starts):
        return _labels_one_by_one(ids, offsets, spans)
    labels, last = [IGNORE_INDEX] * len(ids), []
    for begin, end in spans:
        first, behind = bisect_right(stops, begin), bisect_left(starts, end)
        while behind < len(ids) and starts[behind] == stops[behind]:
            if behind and stops[behind - 1] >= end:
                break
            behind += 1
        if first < behind:
            labels[first:behind] = ids[first:behind]
            last.append(behind - 1)
    return labels, last


def _labels_one_by_one(
    ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]
) -> tuple[list[int], list[int]]:
    """`_labels` for offsets in any order."""
    labels, last, before = [IGNORE_INDEX] * len(ids), {}, 0
    for i, (start, stop) in enumerate(offsets):
        if start == stop:
            start = min(before, start)
        before = max(before, stop)
        for number, (begin, end) in enumerate(spans):
            if start < end and stop > begin:
                labels[i] = ids[i]
                last[number] = i
    return labels, list(last.values())
