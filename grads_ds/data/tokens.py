"""Samples -> token ids and labels: the one place that says which tokens the loss is on.

Reads a tokenizer folder (or hub id) and, when configured, a chat template file; writes nothing. Probe, SFT and evaluation all use
what stands here:

- chat rows: rendered by the model's own chat template; targets are the assistant turns with the token that ends them (so that
  the model learns to stop), and nothing else;
- text rows: tokenised as the tokenizer does it (with the BOS/EOS it adds); every token is a target;
- `labels` are aligned with `input_ids`, IGNORE where a token is no target. The model shifts them: the loss at position t is that of
  labels[t + 1], so labels[0] never counts and `num_target_tokens` is the count over labels[1:].

Where the assistant turns lie is taken from the template's `{% generation %}` marks, else derived by `turns.assistant_spans`.
transformers (and with it torch) is imported when a tokenizer is loaded, not before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.config import ModelConfig, UserError
from grads_ds.data.collate import IGNORE
from grads_ds.data.formats import Message, RowFault, Sample
from grads_ds.data.turns import Span, assistant_spans, marked_spans

# For tokenizers without a chat template. `bos` is the BOS token when the tokenizer adds one itself, else nothing.
PLAIN_TEMPLATE = (
    "{{ BOS }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '### Assistant:\\n' }}"
    "{% generation %}{{ m['content'] }}{{ eos_token or '\\n\\n' }}{% endgeneration %}{{ '\\n\\n' if eos_token }}"
    "{% else %}{{ '### ' + m['role'].capitalize() + ':\\n' + m['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample. `dropped` names the reason when it cannot be used; `truncated` says that tokens were cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    dropped: str | None = None


def num_target_tokens(labels: Sequence[int]) -> int:
    """Tokens the loss is on: labels after the first that are not IGNORE (the first token has no context)."""
    return sum(label != IGNORE for label in labels[1:])


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer with the chat template that will be used set on it. Raises UserError.

    The template is `model.chat_template`'s file, else the tokenizer's own, else PLAIN_TEMPLATE.
    """
    faults = check_tokenizer(model)
    if faults:
        raise UserError(faults)
    from transformers import AutoTokenizer

    folder = Path(model.path)
    try:
        if folder.is_dir() and not any((folder / f).is_file() for f in _TOKENIZER_FILES if f != "tokenizer.model"):
            tokenizer = _sentencepiece_tokenizer(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # a damaged or foreign folder makes the library raise anything
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"model.path: wanted a tokenizer in {model.path}; found none that loads ({type(error).__name__}: {reason}); "
            f"copy the tokenizer's files there"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"model.path: wanted a tokenizer that reports character offsets; found {type(tokenizer).__name__}, which does not; "
            f"convert it to tokenizer.json (transformers' convert_slow_tokenizer)"
        )
    if model.chat_template:
        tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        added = tokenizer("a").input_ids
        bos = tokenizer.bos_token if added and added[0] == tokenizer.bos_token_id else None
        tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ BOS }}", "{{ bos_token }}" if bos else "")
    tokenizer.model_max_length = int(1e30)  # lengths are data.max_length's business; spares a warning per long row
    return tokenizer


def check_tokenizer(model: ModelConfig) -> list[str]:
    """Faults that can be seen without loading anything."""
    faults = []
    folder = Path(model.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        faults.append(
            f"model.path: wanted a tokenizer in {folder} ({', '.join(_TOKENIZER_FILES[:3])} ...); found none; "
            f"copy the tokenizer's files there"
        )
    if model.chat_template and not Path(model.chat_template).is_file():
        faults.append(
            f"model.chat_template: wanted a Jinja file; found none at {model.chat_template}; give an existing path or null"
        )
    return faults


def _sentencepiece_tokenizer(folder: Path) -> Any:
    """A folder with `tokenizer.model` alone: the class whose pieces are those of SentencePiece itself."""
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "Once upon a time, there was\na 7-year-old  girl."
    wanted = pieces.encode(text)
    for kind in (LlamaTokenizer, AutoTokenizer):
        tokenizer = kind.from_pretrained(folder)
        if tokenizer(text, add_special_tokens=False).input_ids == wanted:
            return tokenizer
    raise UserError(
        f"model.path: wanted tokenizer.model in {folder} to be read as SentencePiece itself reads it; no tokenizer class does; "
        f"add the model's tokenizer_config.json or tokenizer.json"
    )


def fingerprint(tokenizer: Any) -> str:
    """32 hex digits that change with the vocabulary, the merges, the special tokens or the chat template."""
    parts = [tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
    parts.append(json.dumps(tokenizer.chat_template, sort_keys=True))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


# ---- samples --------------------------------------------------------------------------------------------------------


class Encoder:
    """Turns samples into `Encoded`. Holds the tokenizer and what is worth knowing of it once."""

    def __init__(self, tokenizer: Any, max_length: int, overlong: str = "truncate"):
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(tokenizer.all_special_tokens)
        self.special = tuple(sorted(special, key=len, reverse=True))

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | RowFault]:
        """One result per sample, in order; a RowFault where the template cannot render the sample or would mislabel it."""
        results: list[Encoded | RowFault | None] = [None] * len(samples)
        texts: list[str] = []
        chats: list[tuple[int, list[Span]]] = []
        for i, sample in enumerate(samples):
            if sample.messages is None:
                results[i] = self._text(sample.text or "")
            elif not any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) and m.get("weight", 1)
                         for m in sample.messages):  # fmt: skip
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
            batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
            for (i, spans), ids, offsets in zip(chats, batch["input_ids"], batch["offset_mapping"], strict=True):
                results[i] = self._fit(ids, _labels(ids, offsets, spans))
        return results  # type: ignore[return-value]

    def render(self, sample: Sample) -> tuple[str, list[Span]]:
        """The sample's text under the chat template and the character spans of its targets. Raises RowFault."""
        template = self.tokenizer.get_chat_template(tools=sample.tools)
        messages = [m if "tool_calls" in template else _calls_as_text(m) for m in sample.messages or []]
        marked = bool(_MARKS.search(template))

        def rendered(turns: list[Message], prompt: bool = False) -> tuple[str, list[Span]]:
            from transformers.utils.chat_template_utils import render_jinja_template

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
        except Exception as error:  # templates raise their own errors on roles and orders they do not know
            found = f"it refuses ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'})"
            raise RowFault("turns the chat template accepts", found, "reorder the turns or set model.chat_template") from None
        if marked:
            return text, marked_spans(text, marks, messages, self.tokenizer.eos_token)
        return text, assistant_spans(text, messages, lambda turns, prompt: rendered(turns, prompt)[0], self.special)

    def _text(self, text: str) -> Encoded:
        if not text.strip():
            return Encoded([], [], dropped="empty text")
        ids = self.tokenizer(text, return_attention_mask=False)["input_ids"]
        return self._fit(ids, list(ids))

    def _fit(self, ids: list[int], labels: list[int]) -> Encoded:
        if num_target_tokens(labels) == 0:
            return Encoded([], [], dropped="no target token")
        if len(ids) <= self.max_length:
            return Encoded(ids, labels)
        if self.overlong == "drop":
            return Encoded([], [], dropped="longer than max_length")
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if num_target_tokens(labels) == 0:
            return Encoded([], [], dropped="no target left within max_length")
        return Encoded(ids, labels, truncated=True)


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[Span]) -> list[int]:
    """A token is a target when it holds at least one character of a span."""
    labels, spans, at, before = [IGNORE] * len(ids), sorted(spans), 0, 0
    for i, (start, end) in enumerate(offsets):
        if start == end:  # byte-level tokenizers trim blanks off the offsets; such a token begins where the last one ended
            start = min(before, start)
        before = max(before, end)
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        if at < len(spans) and start < spans[at][1] and end > spans[at][0]:
            labels[i] = ids[i]
    return labels


def _calls_as_text(message: Message) -> Message:
    """For templates that know no tool calls: the call as JSON text, rather than a turn that silently says nothing."""
    if not message.get("tool_calls"):
        return message
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message["tool_calls"]]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": content}


logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
