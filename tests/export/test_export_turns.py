"""Calls, results, marks and reasoning of turns in the exports: carried on, or the row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.export.subset import export_subset
from tests.export.subsets import (
    ANSWERED,
    ASKED,
    CALLS,
    MASKED,
    RESULT,
    ROWS,
    called,
    export,
    lines,
    tool,
    write,
)


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


def test_reasoning_is_carried_on_or_refused(run: Path) -> None:
    thought = {"messages": [ASKED, ANSWERED | {"thinking": "it is day"}]}
    write(run, [thought])
    (row,) = lines(export(run, "llamafactory") / "subset.jsonl")
    assert row["messages"][1]["content"] == "<think>\nit is day\n</think>\n\nblue"
    for name in ("trl", "axolotl"):
        (row,) = lines(export(run, name) / "subset.jsonl")
        assert row["messages"][1]["reasoning_content"] == "it is day"
    with pytest.raises(UserError, match="reasoning content at turn 2"):
        export(run, "megatron")


def test_a_pair_meant_as_plain_text_stays_one_or_is_refused(run: Path) -> None:
    write(run, [{"prompt": "the sky is", "completion": " blue"}])
    config = Config(
        run_dir=str(run),
        model={"path": "m"},
        data={"train": ["d"], "format": "prompt_completion_text"},
    )
    export_subset(config, run, "selected", "trl", run / "trl")
    assert lines(run / "trl/subset.jsonl") == [{"prompt": "the sky is", "completion": " blue"}]
    with pytest.raises(UserError, match="export to trl"):
        export_subset(config, run, "selected", "axolotl", run / "axolotl")


def test_plain_texts_are_exported_as_such_and_not_mixed(run: Path) -> None:
    write(run, [{"text": "a sky"}, {"text": "a grass"}])
    entry = yaml.safe_load((export(run, "axolotl") / "axolotl.yaml").read_text())["datasets"][0]
    assert (entry["type"], entry["field"]) == ("completion", "text")
    write(run, [{"text": "a sky"}, *ROWS])
    with pytest.raises(UserError, match="found 3 and 1"):
        export(run, "trl")
    assert not (run / "trl").exists()
