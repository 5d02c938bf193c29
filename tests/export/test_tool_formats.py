"""Each tool finds in its export what its own documentation says it reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import yaml

from tests.export.subsets import CALLS, MASKED, TURNS, export, lines, tool, turns, write


def test_llama_factory_reads_calls_and_results_as_sides_that_take_turns(run: Path) -> None:
    write(run, CALLS)
    out = export(run, "llamafactory")
    tags = json.loads((out / "dataset_info.json").read_text())["grads_subset"]["tags"]
    first, second, _ = lines(out / "subset.jsonl")
    roles = [
        tags[name] for name in ("user_tag", "function_tag", "observation_tag", "assistant_tag")
    ]
    assert [turn["role"] for turn in first["messages"]] == roles
    assert json.loads(first["messages"][1]["content"]) == [
        {"name": "look", "arguments": {"color": 1}}
    ]
    assert json.loads(second["messages"][1]["content"]) == [
        {"name": "see", "arguments": {"grass": "no"}}
    ]
    assert json.loads(first["tools"]) == [tool("look", color="number")["function"]]


def test_axolotl_is_told_which_turns_are_not_learnt_and_gets_arguments_it_can_read(
    run: Path,
) -> None:
    write(run, [*MASKED, *CALLS])
    out = export(run, "axolotl")
    entry = yaml.safe_load((out / "axolotl.yaml").read_text())["datasets"][0]
    rows = lines(out / "subset.jsonl")
    flag = entry["message_field_training"]
    learnt = [
        [turn.get(flag, turn["role"] in entry["roles_to_train"]) for turn in row["messages"]]
        for row in rows[:3]
    ]
    assert learnt == [
        [False, False, False, True],
        [False, False, True, False, True],
        [False, False, False, True],
    ]
    calls = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows[3:5]]
    assert [json.loads(text) for text in calls] == [{"color": 1}, {"grass": "no"}]
    schema = json.loads(rows[3][entry["field_tools"]][0]["function"]["parameters"])
    assert schema == tool("look", color="number")["function"]["parameters"]


def test_llama_factory_finds_columns_and_tags_it_declares(run: Path) -> None:
    out = export(run, "llamafactory")
    entry = json.loads((out / "dataset_info.json").read_text())["grads_subset"]
    rows = lines(out / entry["file_name"])
    tags, column = entry["tags"], entry["columns"]["messages"]
    assert entry["formatting"] == "sharegpt"
    for row, (asked, answered) in zip(rows, TURNS, strict=True):
        first, second = row[column]
        assert (first[tags["role_tag"]], first[tags["content_tag"]]) == (tags["user_tag"], asked)
        assert (second[tags["role_tag"]], second[tags["content_tag"]]) == (
            tags["assistant_tag"],
            answered,
        )
        assert json.loads(row[entry["columns"]["tools"]]) == []


def test_axolotl_config_names_the_fields_of_the_data(run: Path) -> None:
    out = export(run, "axolotl")
    entry = yaml.safe_load((out / "axolotl.yaml").read_text())["datasets"][0]
    rows = lines(out / entry["path"])
    names = entry["message_property_mappings"]
    found = [
        tuple(message[names["content"]] for message in row[entry["field_messages"]]) for row in rows
    ]
    assert (
        entry["type"] == "chat_template"
        and entry["roles_to_train"] == ["assistant"]
        and found == TURNS
    )


def test_megatron_index_read_by_its_specification_gives_the_chosen_tokens(run: Path) -> None:
    out = export(run, "megatron")
    index, tokens = (
        (out / "subset_text_document.idx").read_bytes(),
        (out / "subset_text_document.bin").read_bytes(),
    )
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, dtype, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert (version, dtype, sequences, documents) == (1, 4, 3, 4)
    at = 9 + struct.calcsize("<QBQQ")
    lengths = np.frombuffer(index, "<i4", sequences, at)
    pointers = np.frombuffer(index, "<i8", sequences, at + lengths.nbytes)
    bounds = np.frombuffer(index, "<i8", documents, at + lengths.nbytes + pointers.nbytes)
    assert (
        bounds.tolist() == [0, 1, 2, 3]
        and len(index) == at + lengths.nbytes + pointers.nbytes + bounds.nbytes
    )
    read = [
        np.frombuffer(tokens, "<i4", size, place).tolist()
        for size, place in zip(lengths, pointers, strict=True)
    ]
    assert read == [[n + 5] * (n + 2) for n in (0, 3, 4)]
    assert turns(lines(out / "subset.jsonl")) == TURNS
