"""Which format a row is in, and the one `Sample` of messages or text that it stands for. What a row
of each format says, and the keys that tell it, is in messages.py.

Reads rows (dicts) from `sources`; writes nothing. Pure functions. A row that does not fit raises
`RowProblem`, which `load_samples` collects with the row's file and line, so that the user sees
every problem at once.

Roles after normalisation are system, developer, user, assistant and tool; an assistant message with
`weight` 0 is context, not target (also an assistant turn inside a `prompt` message list). A row of
`prompt` and `completion` texts is a chat of two turns, unless `data.format` says
`prompt_completion_text`: then it is plain text of which the completion alone is learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.config.model_and_data import ASKED_FOR, DATA_FORMATS
from grads_ds.data.conversation import Message
from grads_ds.data.input_files import Input
from grads_ds.data.messages import SYSTEM_FIELDS, conversation_of, fits
from grads_ds.data.problems import Problems, RowProblem, found_text
from grads_ds.data.sources import RawRow, find_inputs, read

FORMATS = tuple(name for name in DATA_FORMATS if name not in ASKED_FOR)


@dataclass(frozen=True)
class Sample:
    """A normalised row: exactly one of `messages` and `text` is set.

    The first `context` characters of `text` are no target. `notes` are what prepare counts and says
    once.
    """

    source: str
    origin: str
    row: dict[str, Any]
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    context: int = 0
    notes: tuple[str, ...] = ()


def load_samples(entries: Sequence[str], style: str, problems: Problems) -> Iterator[Sample]:
    """Yield the samples of all entries in order. `style` is one of FORMATS or "auto" (each file's
    first row decides).
    """
    for item in find_inputs(entries, problems):
        yield from samples_of(item, style, problems)


def samples_of(item: Input, style: str, problems: Problems) -> Iterator[Sample]:
    """Yield the samples of one source in order; see `load_samples`."""
    chosen = None if style == "auto" else style
    for raw in read(item, problems):
        try:
            if chosen is None:
                chosen = detect(raw.row)
                if chosen is None:
                    raise _unknown(raw.row)
            check_format(raw.row, chosen, forced=style != "auto")
            yield normalise(raw, chosen)
        except RowProblem as problem:
            problems.add(raw.origin, problem.wanted, problem.found, problem.change)


def check_format(row: dict[str, Any], chosen: str, forced: bool) -> None:
    """Raise RowProblem unless a row is of the format `chosen`, by its keys or because it was
    `forced` on rows that fit.
    """
    found = detect(row)
    if found == chosen or (forced and fits(row, chosen)):
        return
    if found is None:
        raise RowProblem(
            f"a row of format {chosen} ({DATA_FORMATS[chosen]})",
            _keys(row),
            "complete or remove it",
        )
    whose = "the config's data.format" if forced else "the file's first row"
    raise RowProblem(
        f"format {chosen}, as {whose} says",
        f"format {found}",
        "keep one format per file and config",
    )


def detect(row: dict[str, Any]) -> str | None:
    """The format a row is in by its keys, None when it is none of FORMATS."""
    return next((name for name in FORMATS if fits(row, name)), None)


def normalise(raw: RawRow, style: str) -> Sample:
    """The sample a row stands for. Raises RowProblem."""
    row = raw.row
    if style in ("text", "prompt_completion_text"):
        return _plain(raw, ["text"] if style == "text" else ["prompt", "completion"])
    said = conversation_of(row, style)
    if not any(m["role"] == "assistant" for m in said.messages):
        raise RowProblem(
            "at least one assistant turn (there is nothing to learn otherwise)",
            _turns(said.messages),
            "add the answer",
        )
    return Sample(
        raw.source,
        raw.origin,
        row,
        messages=said.messages,
        tools=said.tools or None,
        notes=tuple(said.notes),
    )


def _plain(raw: RawRow, fields: list[str]) -> Sample:
    """The sample of a row whose texts, one behind the other, are trained on as they stand."""
    for name in fields:
        if not isinstance(raw.row[name], str):
            found = found_text(raw.row[name])
            raise RowProblem(f"{name} as a string", found, "write the text itself")
    texts = [str(raw.row[name]) for name in fields]
    notes = tuple(
        f"field {key!r} beside plain text is not read" for key in SYSTEM_FIELDS if raw.row.get(key)
    )
    return Sample(
        raw.source,
        raw.origin,
        raw.row,
        text="".join(texts),
        context=sum(map(len, texts[:-1])),
        notes=notes,
    )


def _unknown(row: dict[str, Any]) -> RowProblem:
    looks = "; ".join(f"{name} ({DATA_FORMATS[name]})" for name in FORMATS)
    return RowProblem(
        f"one of the formats {looks}", _keys(row), "rename the fields or convert the file"
    )


def _keys(row: dict[str, Any]) -> str:
    return f"the fields {', '.join(map(repr, list(row)[:10]))}" if row else "no fields"


def _turns(messages: list[Message]) -> str:
    return f"turns of {', '.join(m['role'] for m in messages[:8])}" if messages else "no turns"
