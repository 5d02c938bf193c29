"""What prepare counts and says, and a real pool with a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from grads_ds.config.config import Config
from tests.data.test_prepare import answer, changed, config, faults_of, prepare, write

__all__ = ["config"]  # a fixture


def test_real_pool_with_the_real_model(material: Path, tmp_path: Path) -> None:
    data = material / "data"
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(material / "models/base-8M")},
            "data": {
                "train": [
                    str(data / "medicine_pubmedqa_train.jsonl"),
                    str(data / "sharegpt_format_tools.json"),
                ],
                "validation": {"general": str(data / "general_seed_tasks.jsonl")},
                "max_length": 512,
                "dropped_content": "count",  # this template knows no tools
            },
        }
    )
    pool, record = prepare(config)
    counts = record["sets"]["pool"]
    assert counts["left_out"]["tool schema"] == 191
    assert counts["read"] == 800 == counts["kept"] + sum(counts["dropped"].values())
    assert pool["sample_id"] == list(range(counts["kept"]))
    assert all(any(label != -100 for label in labels[1:]) for labels in pool["labels"])
    assert set(pool["source"]) == {"medicine_pubmedqa_train", "sharegpt_format_tools"}
    assert (
        len(load_from_disk(str(tmp_path / "run/prepared/general")))
        == record["sets"]["general"]["kept"]
    )


def test_an_anchor_that_shares_rows_is_told(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the anchor that are in a held-out set or in the pool too: how many, where, why it
    matters; the stage goes on.
    """
    own = [
        answer("a new one"),
        answer("another"),
        answer("yes"),
        answer("no"),
        answer("the answer is 5", kind="good", n=5),
    ]
    file = write(tmp_path / "anchor.jsonl", own)
    probe = {"epochs": 0, "extras": ["anchor"]}
    anchored = Config.model_validate(config.model_dump() | {"probe": probe | {"anchor": [file]}})
    _, record = prepare(anchored)
    told = capsys.readouterr().err
    assert "2 of its 5 rows are in data.validation.domain too" in told and "no fair test" in told
    assert "1 of its 5 rows are in data.train too" in told
    assert (
        record["sets"]["anchor"]["also_held_out"] == {"domain": 2}
        and record["sets"]["anchor"]["also_in_pool"] == 1
    )
    write(tmp_path / "anchor.jsonl", own[:2])
    prepare(anchored)
    assert "WARNING" not in capsys.readouterr().err


# ---- what is said --------------------------------------------------------------------------------


def test_what_is_left_out_or_changed_is_counted_in_summary_and_record(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = [{"name": "look", "parameters": {"type": "object", "properties": {"where": {}}}}]
    rows = [answer("red", tools=tools), answer("a </s> b"), answer("blue")]
    rows[2]["messages"][1]["is_training_turn"] = True
    path = write(tmp_path / "x.jsonl", rows)
    (fault,) = faults_of(changed(config, train=[path]))
    assert fault.startswith(f"{path}:1: ") and "data.dropped_content: count" in fault
    _, record = prepare(changed(config, train=[path], dropped_content="count"))
    counts = record["sets"]["pool"]
    assert counts["left_out"] == {"tool schema": 1}
    assert counts["notes"]["control tokens in texts became text"] == 1
    assert counts["answer_ends"] == {"2": 3}  # </s>
    said = capsys.readouterr().err
    assert "pool: 1 times the chat template left out the tool schema" in said
    assert "control tokens in texts became text: 1" in said
    assert said.count("'is_training_turn'") == 1


def test_numbers_that_json_lacks_become_null_and_are_counted(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text(
        json.dumps(answer("red", score=float("nan"), more=[float("inf"), 1.5]))
        + "\n"
        + json.dumps(answer("blue", score=1e999))
        + "\n"
        + json.dumps(answer("no"))
        + "\n"
    )
    pool, record = prepare(changed(config, train=[str(tmp_path / "x.jsonl")]))

    def strict(name: str) -> Any:
        raise ValueError(name)

    rows = [json.loads(row, parse_constant=strict) for row in pool["row"]]
    assert [row.get("score") for row in rows] == [None, None, None]
    assert rows[0]["more"] == [None, 1.5]
    assert record["sets"]["pool"]["notes"] == {"rows with NaN or Infinity, written as null": 2}


def test_what_of_a_folder_is_not_read_is_said_once_and_recorded(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    write(folder / "train-00000-of-00001.jsonl", [answer("red")])
    write(folder / "test-00000-of-00001.jsonl", [answer("blue")])
    pool, record = prepare(changed(config, train=[str(folder)]))
    assert len(pool) == 1
    (remark,) = record["remarks"]
    assert "test-00000-of-00001.jsonl (split test; only train is read)" in remark
    assert capsys.readouterr().err.count(remark) == 1


def test_answers_without_an_end_are_warned_of(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    model = config.model.model_dump() | {"chat_template": str(template)}
    path = write(tmp_path / "x.jsonl", [answer("blue")])
    prepare(Config.model_validate(changed(config, train=[path]).model_dump() | {"model": model}))
    assert "does not teach the model to stop" in capsys.readouterr().err


def test_half_a_character_is_a_fault_not_a_crash(config: Config, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    (fault,) = faults_of(changed(config, train=[str(tmp_path / "x.jsonl")]))
    assert fault.startswith(f"{tmp_path / 'x.jsonl'}:2: wanted text that is valid Unicode")
