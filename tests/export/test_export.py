"""Exports: another tool's own reader, or its format's specification, finds every chosen row in what
was written.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_model
from grads_ds.cli import main
from grads_ds.commands.export import TOOLS
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data.formats import detect, normalise
from grads_ds.data.sources import RawRow
from grads_ds.data.tokens import Encoder
from grads_ds.export.subset import TOOLS as WRITERS
from grads_ds.export.subset import export_subset
from grads_ds.flow.stages import STAGES
from grads_ds.run_dir.units import mark_done

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "what is the sky"},
            {"role": "assistant", "content": "blue “quoted”"},
        ]
    },
    {"instruction": "color of grass", "input": "", "output": "green"},
    {"conversations": [{"from": "human", "value": "yes"}, {"from": "gpt", "value": "no"}]},
]
TURNS = [("what is the sky", "blue “quoted”"), ("color of grass", "green"), ("yes", "no")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "selection").mkdir(parents=True)
    write(folder, ROWS)
    pool = [
        {"sample_id": n, "input_ids": [n + 5] * (n + 2), "labels": [-100] * (n + 2)}
        for n in range(6)
    ]
    Dataset.from_list(pool).save_to_disk(str(folder / "prepared/pool"))
    table = pa.table(
        {"sample_id": np.arange(6), "selected": np.array([True, False, False, True, True, False])}
    )
    pq.write_table(table, folder / "selection/selection.parquet")
    return folder


def write(run: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run / "selection/selected.jsonl").write_text(text, encoding="utf-8")


def export(run: Path, tool: str) -> Path:
    config = Config(run_dir=str(run), model={"path": "m"}, data={"train": ["d"]})
    out = run / tool
    export_subset(config, run, "selected", tool, out)
    return out


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def turns(rows: Any) -> list[tuple[str, str]]:
    return [tuple(message["content"] for message in row["messages"]) for row in rows]  # type: ignore[misc]


def test_trl_trains_on_it(run: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    base = make_tiny_model(tmp_path / "base")
    data = load_dataset(
        "json",
        data_files=str(export(run, "trl") / "subset.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert turns(data) == TURNS
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=3,
        assistant_only_loss=True,
        use_cpu=True,
        report_to=[],
        bf16=False,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    assert np.isfinite(trainer.train().training_loss)


CALLING = """{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>
{% generation %}{{ m['content'] }}\
{% for c in m.get('tool_calls') or [] %}{{ c['function'] | tojson }}{% endfor %}\
</s>{% endgeneration %}
{% else %}<|{{ m['role'] }}|>
{{ m['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""  # a chat template that knows tool calls


def called(name: str, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool(name: str, **fields: str) -> dict[str, Any]:
    properties = {field: {"type": kind} for field, kind in fields.items()}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


ASKED, ANSWERED = (
    {"role": "user", "content": "what is the sky"},
    {"role": "assistant", "content": "blue"},
)
RESULT = {"role": "tool", "content": "red"}
# two calls whose arguments have nothing in common, the second as OpenAI's API writes them
CALLS: list[dict[str, Any]] = [
    {
        "messages": [ASKED, called("look", {"color": 1}), RESULT, ANSWERED],
        "tools": [tool("look", color="number")],
    },
    {"messages": [ASKED, called("see", '{"grass": "no"}')], "tools": [tool("see", grass="string")]},
    {"messages": [ASKED, ANSWERED]},
]
MASKED: list[dict[str, Any]] = [
    {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED | {"weight": 1}]},
    {"messages": [{"role": "system", "content": "yes"}, ASKED, ANSWERED, ASKED, ANSWERED]},
    {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]},
]


@pytest.mark.parametrize("rows", [CALLS, MASKED], ids=["tool calls", "weight 0"])
def test_trl_trains_on_the_tokens_that_we_train_on(
    run: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    trl = pytest.importorskip("trl")
    write(run, rows)
    base = make_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CALLING
    encoder = Encoder(tokenizer, 256)
    samples = [normalise(RawRow("", "", "", row), detect(row) or "") for row in rows]
    ours = [(sample.input_ids, sample.labels) for sample in encoder.encode(samples)]  # type: ignore[union-attr]
    data = load_dataset(
        "json",
        data_files=str(export(run, "trl") / "subset.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_length=256,
        assistant_only_loss=True,
        use_cpu=True,
        report_to=[],
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset
    assert [(row["input_ids"], row["labels"]) for row in theirs] == ours
    assert any(0 < sum(label == -100 for label in labels) < len(labels) for _, labels in ours)


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


@pytest.mark.parametrize(
    ("name", "row", "found"),
    [
        (
            "trl",
            {"messages": [ASKED, ANSWERED, ASKED, ANSWERED | {"weight": 0}]},
            "one after turn 2",
        ),
        ("llamafactory", MASKED[0], "weight 0 at turn 2"),
        (
            "llamafactory",
            {"messages": [ASKED, called("look", {}), RESULT, RESULT, ANSWERED]},
            "observation, observation",
        ),
        (
            "llamafactory",
            {"messages": [ASKED, called("look", {}) | {"content": "well"}]},
            "does both",
        ),
        ("megatron", MASKED[0], "weight 0 at turn 2"),
        ("megatron", CALLS[0], "tool calls at turn 2"),
    ],
)
def test_a_row_that_a_tool_cannot_hold_is_named_and_nothing_is_written(
    run: Path, name: str, row: dict[str, Any], found: str
) -> None:
    write(run, [CALLS[2], row, CALLS[2]])
    with pytest.raises(UserError, match=rf"selected\.jsonl:2: wanted .*; found .*{found}"):
        export(run, name)
    assert not (run / name).exists()


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


def test_plain_texts_are_exported_as_such_and_not_mixed(run: Path) -> None:
    write(run, [{"text": "a sky"}, {"text": "a grass"}])
    entry = yaml.safe_load((export(run, "axolotl") / "axolotl.yaml").read_text())["datasets"][0]
    assert (entry["type"], entry["field"]) == ("completion", "text")
    write(run, [{"text": "a sky"}, *ROWS])
    with pytest.raises(UserError, match="found 3 and 1"):
        export(run, "trl")
    assert not (run / "trl").exists()


def test_the_command_exports_and_refuses_a_folder_that_is_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(TOOLS) == set(WRITERS)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished(run)))
    call = ["export", str(config), "--to", "axolotl", "--out", str(tmp_path / "there")]
    assert main(call) == 0 and "3 rows for axolotl" in capsys.readouterr().out
    assert main(call) == 2 and "wanted a new folder" in capsys.readouterr().err


def finished(run: Path) -> dict[str, Any]:
    """A config, all of whose units up to the selection are recorded as done in `run`."""
    zero = run.parent / "zero3.json"
    zero.write_text("{}")
    tree = {
        "run_dir": str(run),
        "model": {"path": "m"},
        "data": {"train": ["d"]},
        "probe": {"epochs": 0},
        "deepspeed": str(zero),
    }
    made = Config.model_validate(tree)
    for stage in STAGES[:3]:
        for unit in stage.units(made, run):
            outputs = [name for name in unit.outputs if (run / name).exists()]
            mark_done(run, unit.name, unit.inputs, outputs, 0.0)
    return tree


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda run, tree: tree["data"].update(max_length=64), "prepare: data.max_length"),
        (lambda run, tree: tree.update(select={"budget": 0.5}), "select.budget was 0.05, now 0.5"),
        (lambda run, tree: (run / "state/select.selected.json").unlink(), "not done yet"),
        (lambda run, tree: (run / "selection/selected.jsonl").write_text("{}"), "was altered"),
        (lambda run, tree: (run / "selection/selected.jsonl").unlink(), "is gone"),
    ],
)
def test_nothing_is_exported_but_a_finished_selection_of_this_config(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, wanted: str
) -> None:
    tree = finished(run)
    damage(run, tree)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert main(["export", str(config), "--to", "trl", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "export: wanted select/selected finished under this config" in said and wanted in said
    assert not (tmp_path / "out").exists()


def test_a_selection_of_an_earlier_config_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished(run)))
    call = ["export", str(config), "--to", "trl", "--out", str(tmp_path / "out")]
    assert main([*call, "--variant", "random"]) == 2
    assert "wanted a selection of this config; found random" in capsys.readouterr().err
