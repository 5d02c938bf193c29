"""Each tool finds in its export what its own documentation says it reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import yaml

from tests.export.subsets import TURNS, export, lines, turns


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
