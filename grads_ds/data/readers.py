"""How each kind of input is read: one function per kind, yielding (line or row number from 1, row
as given). JSON and text here, tables in `tables`.

Reads the files and data sets that `sources` found; writes nothing. What cannot be read is added to
the problems with its file and line, and reading goes on with the next row where that makes sense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from grads_ds.data import input_files
from grads_ds.data.input_files import Input, lines
from grads_ds.data.problems import Problems
from grads_ds.data.strict_json import decode_at, loads
from grads_ds.data.tables import arrow_rows, csv_rows, hub_rows, parquet_rows, saved_rows

# fields of a row that hold lists of objects: a file of one such object is one row, not a table
_ROW_FIELDS = {"messages", "conversations", "conversation", "prompt", "completion"}
_LONGEST_OBJECT = 2000  # lines looked ahead for the end of an object that a line leaves open
TEXT_LARGEST = 2**30  # characters of one JSON text, which is read as a whole
_BLANK = re.compile(r"[ \t\r\n]*")


def _broken(where: str, error: json.JSONDecodeError, problems: Problems) -> None:
    problems.add(where, "valid JSON", f"{error.msg} at column {error.colno}", "correct that line")


def _json_lines(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    ahead: list[tuple[int, str]] = []  # lines that were looked at already
    rest = lines(item, problems)
    while (numbered := ahead.pop(0) if ahead else next(rest, None)) is not None:
        number, line = numbered
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _json(item, problems)
            return
        try:
            yield number, loads(line)
        except json.JSONDecodeError as error:
            if _left_open(line, error) and not ahead:
                ahead, whole = _look_ahead(line, rest)
                if whole:
                    problems.add(
                        f"{item.path}:{number}",
                        "one JSON object per line",
                        "an object spread over several lines",
                        "write one per line, for instance by: jq -c . FILE",
                    )
                    return
            _broken(f"{item.path}:{number}", error, problems)


def _left_open(line: str, error: json.JSONDecodeError) -> bool:
    """Whether the line ends inside a value rather than holding a wrong one."""
    return error.pos >= len(line.rstrip()) and line.lstrip().startswith("{")


def _look_ahead(line: str, rest: Iterator[tuple[int, str]]) -> tuple[list[tuple[int, str]], bool]:
    """(the lines read on, whether they close the object that `line` opens)."""
    ahead: list[tuple[int, str]] = []
    text = line
    for numbered in rest:
        ahead.append(numbered)
        text += numbered[1]
        if numbered[1].strip() in ("}", "},", "]", "],") or len(ahead) % 50 == 0:
            try:
                decode_at(text, text.index("{"))
                return ahead, True
            except json.JSONDecodeError as error:
                if not _left_open(text, error):
                    return ahead, False
        if len(ahead) >= _LONGEST_OBJECT or len(text) > input_files.LINE_LARGEST:
            break
    return ahead, False


def _json(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    before, size, kept = problems.count, 0, []
    for number, line in lines(item, problems):
        kept.append(line)
        size += len(line)
        if size > TEXT_LARGEST:
            wanted = f"at most {TEXT_LARGEST:,} characters in one JSON text"
            fix = "write one row per line, for instance by: jq -c '.[]' FILE"
            problems.add(f"{item.path}:{number}", wanted, "more", fix)
            return
    if problems.count > before:
        return
    text = "".join(kept)
    start = text.lstrip()[:1]
    if start == "[":
        yield from _json_array(item, text, problems)
        return
    try:
        value = loads(text)
    except json.JSONDecodeError as error:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if not first:
            return
        if _parses(first) or error.msg == "Extra data":
            yield from _json_lines(item, problems)
        else:
            _broken(f"{item.path}:{error.lineno}", error, problems)
        return
    key = _table_key(value)
    if key is None:
        yield 1, value
    else:  # {"data": [...]}
        opened = re.search(re.escape(json.dumps(key)) + r"\s*:\s*", text)
        yield from _json_array(item, text, problems, after=opened.end() if opened else None)


def _table_key(value: Any) -> str | None:
    """The key of an object's one list of rows; None when the object is itself a row."""
    if not isinstance(value, dict) or _ROW_FIELDS & value.keys():
        return None
    tables = [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    ]
    return tables[0] if len(tables) == len(value) == 1 else None


def _parses(text: str) -> bool:
    try:
        loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _json_array(
    item: Input, text: str, problems: Problems, after: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Elements of the array that opens at `after`, each with the line it starts on."""

    def skip(place: int) -> int:
        return _BLANK.match(text, place).end()  # type: ignore[union-attr]

    at = skip((text.index("[") if after is None else after) + 1)
    line, counted = 1, 0
    try:
        while text[at : at + 1] != "]":
            value, end = decode_at(text, at)
            line, counted = line + text.count("\n", counted, at), at
            yield line, value
            at = skip(end)
            if text[at : at + 1] == ",":
                at = skip(at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    except json.JSONDecodeError as error:
        _broken(f"{item.path}:{error.lineno}", error, problems)


def _paragraphs(item: Input, problems: Problems) -> Iterator[tuple[int, Any]]:
    begins, size, kept = 0, 0, []  # type: tuple[int, int, list[str]]
    for number, line in lines(item, problems):
        if line.strip():
            begins, size = (begins, size + len(line)) if kept else (number, len(line))
            kept.append(line.rstrip("\r\n"))
            if size > input_files.LINE_LARGEST:
                wanted = f"texts of at most {input_files.LINE_LARGEST:,} characters"
                fix = "put blank lines between texts"
                problems.add(f"{item.path}:{begins}", wanted, "a longer one", fix)
                return
        elif kept:
            yield begins, {"text": "\n".join(kept)}
            kept = []
    if kept:
        yield begins, {"text": "\n".join(kept)}


READERS: dict[str, Callable[[Input, Problems], Iterator[tuple[int, Any]]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".txt": _paragraphs,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    "saved": saved_rows,
    "hub": hub_rows,
}
