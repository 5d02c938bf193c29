"""Rows written down in tests, and what becomes of them under a chat template."""

from __future__ import annotations

from typing import Any

from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.formats import Sample, detect, normalise
from grads_ds.data.problems import RowProblem
from grads_ds.data.sources import RawRow
from grads_ds.data.tokens import Encoded, Encoder

# with the tokenizer, whose id stays its own that way
_ENCODERS: dict[Any, tuple[Any, Encoder]] = {}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
OPENING = [Sample("", "", {}, messages=TURNS, tools=tools) for tools in (None, [{}])]


def encode(
    base: Any, template: str, row: dict[str, Any], dropped: str = "refuse", style: str | None = None
) -> Encoded:
    """The row under the template. Raises RowProblem."""
    sample = normalise(RawRow("s", "f:1", "f", row), style or detect(row) or "")
    key = id(base), template, dropped
    if key not in _ENCODERS:
        base.chat_template = template
        _ENCODERS[key] = base, Encoder(base, 4096, dropped_content=dropped)
        _ENCODERS[key][1].encode(OPENING)  # it asks for the template once
    (result,) = _ENCODERS[key][1].encode([sample])
    if isinstance(result, RowProblem):
        raise result
    return result


def text(base: Any, encoded: Encoded) -> str:
    return str(base.decode(encoded.input_ids))


def targets(base: Any, encoded: Encoded) -> str:
    return str(base.decode([label for label in encoded.labels if label != IGNORE_INDEX]))


def chat(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [
            {"role": roles[n % 2], "content": content} for n, content in enumerate(contents)
        ]
    } | more
