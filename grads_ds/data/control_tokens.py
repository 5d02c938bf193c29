"""Control tokens that somebody typed: `<|im_end|>` in a user's text is text, in the template's own
output it is the token.

Before a conversation is rendered, each special token in its texts is replaced by a character of a
private plane. The rendered text is then tokenised by a copy of the tokenizer that takes special
tokens for text, in which the template's own ones are written as other private characters, added to
the copy as tokens. So nothing is cut at the borders and every merge is the tokenizer's own.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from typing import Any

from grads_ds.data.carried import TAGS
from grads_ds.data.conversation import Message
from grads_ds.data.problems import RowProblem
from grads_ds.data.template import Span

_OWN, _TYPED = 0xF0000, 0x100000  # supplementary private use areas A and B
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how SentencePiece writes what it has no piece for
_WORDED = re.compile(r"<\|.+\|>")  # control tokens that were added as ordinary ones
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")

Offsets = list[tuple[int, int]]


class ControlTokens:
    """The special tokens of a tokenizer, and the copy of it that takes them for text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_tokens)
        self.ids = {
            str(token): number
            for number, token in added.items()
            if (token.special or str(token) in named or _WORDED.fullmatch(str(token)))
            and str(token).strip()
            and not _BYTE.fullmatch(str(token))
        }
        self.added = {str(token): token for token in added.values()}
        self.texts = sorted(self.ids, key=len, reverse=True)
        self.place = {text: i for i, text in enumerate(self.texts)}
        self._typed = _any_of(self.texts)
        # reasoning that an answer writes in its content has its tags there by right
        self._typed_in_answers = _any_of([t for t in self.texts if not TAGS.fullmatch(t)])
        self._copy: Any = None

    def protect(self, messages: list[Message], tools: Any) -> tuple[list[Message], Any, int]:
        """The conversation with private characters for typed control tokens, and how many there
        are; the very same objects when there are none.
        """
        found = 0
        changed = []
        for message in messages:
            pattern = self._typed_in_answers if message["role"] == "assistant" else self._typed
            if len(message) == 2 and not pattern.search(message["content"]):
                changed.append(message)
                continue
            new, typed = self._replaced(message, pattern)
            found += typed
            changed.append(new if typed else message)
        new_tools, typed = self._replaced(tools, self._typed) if tools else (tools, 0)
        found += typed
        return (changed, new_tools, found) if found else (messages, tools, 0)

    def _replaced(self, value: Any, pattern: re.Pattern[str]) -> tuple[Any, int]:
        if isinstance(value, str):
            if not pattern.search(value):
                return value, 0
            if _PRIVATE.search(value):
                raise RowProblem(
                    "texts with control tokens or private-use characters",
                    "both in one text",
                    "remove the characters from U+F0000 on",
                )
            return pattern.subn(lambda m: chr(_TYPED + self.place[m.group()]), value)
        if isinstance(value, dict):
            items = {key: self._replaced(item, pattern) for key, item in value.items()}
            keys = {key: key if key == "role" else self._replaced(key, pattern)[0] for key in items}
            total = sum(typed for _, typed in items.values())
            total += sum(new != key for key, new in keys.items())
            return {keys[key]: item for key, (item, _) in items.items()}, total
        if isinstance(value, list):
            listed = [self._replaced(item, pattern) for item in value]
            return [item for item, _ in listed], sum(typed for _, typed in listed)
        return value, 0

    def encode(self, text: str, spans: list[Span]) -> tuple[list[int], Offsets, list[Span]]:
        """Ids and character offsets of a protected, rendered text, and the spans in the text that
        the offsets refer to.
        """
        parts: list[str] = []
        olds, news = [0], [0]  # where corresponding places lie in both texts
        at = new = 0
        for match in re.finditer(f"{self._typed.pattern}|{_PRIVATE.pattern}", text):
            found = match.group()
            written = (
                chr(_OWN + self.place[found])
                if found in self.place
                else self.texts[ord(found) - _TYPED]
            )
            parts += [text[at : match.start()], written]
            new += match.start() - at
            olds.append(match.start())
            news.append(new)
            new += len(written)
            at = match.end()
            olds.append(at)
            news.append(new)
        parts.append(text[at:])
        encoding = self._text_only().encode("".join(parts), add_special_tokens=False)
        ids = [self._own.get(number, number) for number in encoding.ids]
        wrong = set(encoding.ids) & set(self.ids.values())
        if wrong:
            raise RowProblem(
                "texts without control tokens that the tokenizer cannot write as text",
                ", ".join(t for t, number in self.ids.items() if number in wrong),
                "remove them from the text",
            )

        def moved(place: int) -> int:
            i = bisect_right(olds, place) - 1
            return news[i] + place - olds[i]

        return ids, encoding.offsets, [(moved(start), moved(end)) for start, end in spans]

    def _text_only(self) -> Any:
        if self._copy is None:
            from tokenizers import AddedToken, Tokenizer

            parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
            for token in parts["added_tokens"]:  # so that all of them are taken for text
                token["special"] = token["special"] or token["content"] in self.ids
            copy = Tokenizer.from_str(json.dumps(parts))
            copy.no_truncation()
            copy.no_padding()
            for i, text in enumerate(self.texts):
                like = self.added.get(text)
                copy.add_tokens(
                    [
                        AddedToken(
                            chr(_OWN + i),
                            lstrip=bool(like and like.lstrip),
                            rstrip=bool(like and like.rstrip),
                            normalized=bool(like and like.normalized),
                        )
                    ]
                )
            copy.encode_special_tokens = True
            self._own = {
                copy.token_to_id(chr(_OWN + i)): self.ids[text] for i, text in enumerate(self.texts)
            }
            self._copy = copy
        return self._copy


def _any_of(texts: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
