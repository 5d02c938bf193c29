"""A chosen subset in the data formats of other tools, ready to train on there.

Reads selection/selected.jsonl (for Megatron also prepared/pool and selection.parquet); writes a
folder: the data and the tool's own description of it. docs/exports.md shows how each is used. No
torch import.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data.formats import Sample, detect, normalise
from grads_ds.data.problems import Faults, RowFault
from grads_ds.data.sources import RawRow
from grads_ds.run_dir.layout import selection_folder
from grads_ds.run_dir.publish import atomic_path, sweep

DATA = "subset.jsonl"
NAME = "grads_subset"
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_ELSEWHERE = "export to axolotl, which can tell turn by turn, or leave the row out"
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


def export_subset(config: Config, run_dir: Path, name: str, tool: str, out: Path) -> int:
    """Write subset `name` for `tool` (a key of TOOLS) to the folder `out`; the number of rows.

    Raises UserError.
    """
    chosen = run_dir / selection_folder(name) / "selected.jsonl"
    if not chosen.is_file():
        raise UserError(
            f"export: wanted a finished selection; found no {chosen}; run: grads-ds run CONFIG --to"
            " select"
        )
    if out.exists():
        raise UserError(
            f"export: wanted a new folder; {out} exists; give another --out or remove it"
        )
    rows = list(_rows(chosen, config.data.format))
    if tool != "trl" and any("completion" in row for row in rows):
        raise UserError(
            f"export: {tool} has no form for a prompt and a completion of plain text; found"
            " data.format prompt_completion_text; export to trl"
        )
    sweep(out)
    with atomic_path(out) as folder:
        folder.mkdir()
        TOOLS[tool](rows, folder)
        if tool == "megatron":
            _write_indexed(config, run_dir, name, folder / "subset_text_document")
    return len(rows)


def _rows(file: Path, style: str) -> Iterator[dict[str, Any]]:
    """Each chosen row as {"messages": [...], "tools": [...]?}, {"text": ...} or, of plain text,
    {"prompt": ..., "completion": ...}; `style` is data.format.
    """
    faults = Faults()
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            try:
                found = (detect(row) or "") if style == "auto" else style
                sample: Sample = normalise(RawRow("", f"{file}:{number}", str(file), row), found)
            except RowFault as fault:
                faults.add(f"{file}:{number}", fault.wanted, fault.found, fault.change)
                continue
            if sample.messages is None and sample.context:
                yield {key: row[key] for key in ("prompt", "completion")}
            elif sample.messages is None:
                yield {"text": sample.text}
            else:
                yield {"messages": sample.messages} | (
                    {"tools": sample.tools} if sample.tools else {}
                )
    faults.raise_if_any()


def _write_trl(rows: list[dict[str, Any]], folder: Path) -> None:
    """Conversations for SFTTrainer with assistant_only_loss; plain texts for the same trainer
    without it.

    Where an answer anywhere is not to be learnt (weight 0), every row is split into prompt and
    completion, of which the prompt is not.
    """
    rows = _of_one_kind(rows, "trl")
    if any(_context(message) for row in rows for message in row.get("messages", ())):
        rows = _each(rows, _as_prompt_and_completion)
    _write_lines(rows, folder / DATA)


def _as_prompt_and_completion(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    first = next((place for place in answers if not _context(messages[place])), None)
    if first is None:
        raise RowFault("an answer to learn", "weight 0 on every one", "leave the row out")
    if first == 0:
        raise RowFault("a turn before the first answer", "the answer first", "leave the row out")
    if any(_context(messages[place]) for place in answers if place > first):
        raise RowFault(
            "answers of weight 0 before all others", f"one after turn {first + 1}", _ELSEWHERE
        )
    plain = [_without(message, "weight") for message in messages]
    return {"prompt": plain[:first], "completion": plain[first:]} | _without(row, "messages")


def _write_llama_factory(rows: list[dict[str, Any]], folder: Path) -> None:
    """ShareGPT formatting with OpenAI tags, and the dataset_info.json that names it."""
    if "text" in _of_one_kind(rows, "llamafactory")[0]:
        entry: dict[str, Any] = {"file_name": DATA, "columns": {"prompt": "text"}}
    else:
        rows = _each(rows, _as_llama_factory)
        entry = {
            "file_name": DATA,
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "tools": "tools"},
            "tags": _TAGS,
        }
    _write_lines(rows, folder / DATA)
    (folder / "dataset_info.json").write_text(json.dumps({NAME: entry}, indent=2) + "\n")


def _as_llama_factory(row: dict[str, Any]) -> dict[str, Any]:
    """Role and text alone, calls and tools as JSON text.

    Its reader leaves out, with a warning, rows whose sides do not take turns.
    """
    messages = []
    for number, message in enumerate(row["messages"], 1):
        if _context(message):
            raise RowFault("answers that are all learnt", f"weight 0 at turn {number}", _ELSEWHERE)
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            if content.strip():
                raise RowFault(
                    "a turn that calls or speaks",
                    f"turn {number}, which does both",
                    "split or leave it out",
                )
            calls = [call["function"] for call in message["tool_calls"]]
            role, content = "function_call", json.dumps(calls, ensure_ascii=False)
        messages.append({"role": "observation" if role == "tool" else role, "content": content})
    said = [message["role"] for message in messages[messages[0]["role"] == "system" :]]
    sides = (("user", "observation"), ("assistant", "function_call"))
    wrong = next((place for place, role in enumerate(said) if role not in sides[place % 2]), None)
    if wrong is not None or len(said) % 2:
        raise RowFault(
            "a user's turn or one tool result, then one answer, to the end",
            f"turns of {', '.join(said)}",
            "leave it out",
        )
    tools = [tool["function"] for tool in row.get("tools") or []]
    # the same columns in every row
    return {"messages": messages, "tools": json.dumps(tools, ensure_ascii=False)}


def _write_axolotl(rows: list[dict[str, Any]], folder: Path) -> None:
    """chat_template or completion data, and the `datasets` part of an Axolotl config."""
    if "text" in _of_one_kind(rows, "axolotl")[0]:
        entry: dict[str, Any] = {
            "path": DATA,
            "ds_type": "json",
            "type": "completion",
            "field": "text",
        }
    else:
        rows = _each(rows, _as_axolotl)
        entry = {
            "path": DATA,
            "ds_type": "json",
            "type": "chat_template",
            "field_messages": "messages",
            "field_tools": "tools",
            "message_property_mappings": {"role": "role", "content": "content"},
            "roles_to_train": ["assistant"],
            "message_field_training": "train",
            "train_on_eos": "turn",
        }
    _write_lines(rows, folder / DATA)
    (folder / "axolotl.yaml").write_text(yaml.safe_dump({"datasets": [entry]}, sort_keys=False))


def _as_axolotl(row: dict[str, Any]) -> dict[str, Any]:
    """Turns that are not to be learnt say so; arguments and parameters are JSON text, as no two
    calls have the same fields.
    """
    messages = []
    for message in row["messages"]:
        turn = _without(message, "weight") | ({"train": False} if _context(message) else {})
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_arguments_as_text(call) for call in turn["tool_calls"]]
        messages.append(turn)
    tools = []
    for tool in row.get("tools") or []:
        function = tool["function"]
        if "parameters" in function:
            function = function | {
                "parameters": json.dumps(function["parameters"], ensure_ascii=False)
            }
        tools.append(tool | {"function": function})
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _write_megatron(rows: list[dict[str, Any]], folder: Path) -> None:
    """The rows for Megatron-LM's --sft (its tokenizer applies the template); the indexed tokens are
    written beside them.
    """
    _write_lines(_each(rows, _as_megatron), folder / DATA)


def _as_megatron(row: dict[str, Any]) -> dict[str, Any]:
    for number, message in enumerate(row.get("messages", ()), 1):
        if _context(message):
            raise RowFault("answers that are all learnt", f"weight 0 at turn {number}", _ELSEWHERE)
        if message["role"] not in ("system", "user", "assistant") or message.get("tool_calls"):
            found = "tool calls" if message.get("tool_calls") else f"role {message['role']}"
            raise RowFault(
                "text of system, user and assistant", f"{found} at turn {number}", _ELSEWHERE
            )
    return row


TOOLS: dict[str, Callable[[list[dict[str, Any]], Path], None]] = {
    "trl": _write_trl,
    "llamafactory": _write_llama_factory,
    "axolotl": _write_axolotl,
    "megatron": _write_megatron,
}


def _write_indexed(config: Config, run_dir: Path, name: str, prefix: Path) -> None:
    """The chosen rows' tokens as prepared, as Megatron's .bin and .idx (version 1, int32 tokens, a
    document per row).

    .idx, little-endian: magic, version uint64, dtype code uint8 (4 is int32), number of sequences
    uint64, of document bounds uint64; then int32 lengths, int64 byte offsets, int64 document
    bounds.
    """
    import pyarrow.parquet as pq
    from datasets import load_from_disk

    pool = load_from_disk(str(run_dir / "prepared/pool"))
    table = pq.read_table(
        run_dir / selection_folder(name) / "selection.parquet",
        columns=["sample_id", "selected"],
        page_checksum_verification=True,
    )
    wanted = table["sample_id"].to_numpy()[table["selected"].to_numpy(zero_copy_only=False)]
    places = np.flatnonzero(np.isin(np.asarray(pool["sample_id"], np.int64), wanted))
    lengths = []
    with open(f"{prefix}.bin", "wb") as file:
        for row in pool.select(places.tolist()):
            tokens = np.asarray(row["input_ids"], "<i4")
            lengths.append(len(tokens))
            file.write(tokens.tobytes())
    sizes = np.array(lengths, "<i4")
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1] * 4]).astype("<i8")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(_INDEX_MAGIC + struct.pack("<QBQQ", 1, 4, len(sizes), len(sizes) + 1))
        file.write(
            sizes.tobytes() + offsets.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
        )


def _of_one_kind(rows: list[dict[str, Any]], tool: str) -> list[dict[str, Any]]:
    texts = sum("text" in row for row in rows)
    if 0 < texts < len(rows):
        raise UserError(
            f"export: {tool} wants conversations or plain texts in one data set; found"
            f" {len(rows) - texts} and {texts}; select from one kind, or split selected.jsonl by"
            " its keys"
        )
    return rows


def _each(
    rows: list[dict[str, Any]], convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every row converted.

    Raises UserError with the line of each that the tool cannot hold as it is.
    """
    faults, converted = Faults(), []
    for number, row in enumerate(rows, 1):
        try:
            converted.append(convert(row))
        except RowFault as fault:
            faults.add(f"export: selected.jsonl:{number}", fault.wanted, fault.found, fault.change)
    faults.raise_if_any()
    return converted


def _context(message: dict[str, Any]) -> bool:
    """Whether the message is an answer that is not to be learnt."""
    return message["role"] == "assistant" and not message.get("weight", 1)


def _without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def _arguments_as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": text}}


def _write_lines(rows: list[dict[str, Any]], to: Path) -> None:
    with to.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
