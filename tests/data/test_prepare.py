"""prepare publishes complete, stable sets or nothing, and counts every row it was given."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data.stage import check_prepare, run_prepare
from grads_ds.data.tokenizer import load_tokenizer

REPO = Path(__file__).resolve().parents[2]
COLUMNS = {
    "sample_id": "int64",
    "input_ids": "list<int32>",
    "labels": "list<int32>",
    "sample_hash": "string",
    "source": "string",
    "origin": "string",
    "row": "string",
    "metadata": "string",
}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": text},
        ],
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    """A pool of 20 rows of two sources, one row of which is too long, one empty; and one held-out
    set.
    """
    rows = [answer(f"the answer is {i}", kind="good" if i % 2 else "bad", n=i) for i in range(12)]
    rows[3] = answer("")
    rows[7] = answer("blue " * 400)
    alpaca = [{"instruction": f"the color of {i}", "input": "", "output": "red"} for i in range(8)]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny_model)},
            "data": {
                "train": [write(tmp_path / "chat.jsonl", rows), str(tmp_path / "alpaca.json")],
                "validation": {
                    "domain": write(tmp_path / "held.jsonl", [answer("yes"), rows[0], answer("no")])
                },
                "max_length": 64,
                "metadata": ["kind", "absent"],
            },
        }
    )


def changed(config: Config, **data: Any) -> Config:
    return Config.model_validate(config.model_dump() | {"data": config.data.model_dump() | data})


def prepare(config: Config) -> tuple[Any, dict[str, Any]]:
    """Run the stage; returns the pool and prepared.json."""
    run = Path(config.run_dir)
    run_prepare(config, run)
    return load_from_disk(str(run / "prepared/pool")), json.loads(
        (run / "prepared/prepared.json").read_text()
    )


def tree(folder: Path) -> dict[str, str]:
    """Contents of every file below the folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_the_pool_has_the_contracts_columns_and_every_kept_row_once(config: Config) -> None:
    pool, record = prepare(config)
    kinds = {
        name: str(kind).replace("item: ", "").replace("element: ", "")
        for name, kind in zip(pool.data.schema.names, pool.data.schema.types, strict=True)
    }
    assert kinds == COLUMNS
    assert pool["sample_id"] == list(range(19))
    chat, alpaca = config.data.train
    lines = [f"{chat}:{n}" for n in range(1, 13) if n != 4] + [f"{alpaca}:{n}" for n in range(1, 9)]
    assert [origin.rpartition(":")[0] for origin in pool["origin"]] == [
        line.rpartition(":")[0] for line in lines
    ]
    assert pool["origin"][:11] == lines[:11]
    given = [json.loads(line) for line in Path(chat).read_text().splitlines()] + json.loads(
        Path(alpaca).read_text()
    )
    del given[3]
    assert [json.loads(row) for row in pool["row"]] == given
    assert pool["source"] == ["chat"] * 11 + ["alpaca"] * 8
    assert json.loads(pool["metadata"][0]) == {"kind": "bad", "absent": None}
    counts = record["sets"]["pool"]
    assert (counts["read"], counts["kept"], counts["truncated"]) == (20, 19, 1)
    assert counts["dropped"] == {"every answer is empty": 1}
    assert counts["num_tokens"] == sum(map(len, pool["input_ids"]))
    assert counts["sources"]["chat"] == {
        "read": 12,
        "kept": 11,
        "truncated": 1,
        "dropped: every answer is empty": 1,
    }
    assert max(map(len, pool["input_ids"])) == 64
    assert record["sets"]["domain"]["also_in_pool"] == 1


def test_labels_decode_to_the_answers(config: Config) -> None:
    pool, record = prepare(config)
    tokenizer = load_tokenizer(config.model)
    for row in pool.select([0, 1, 18]):
        said = tokenizer.decode([label for label in row["labels"] if label != -100])
        text = json.loads(row["row"])
        assert said.strip() == (text.get("output") or text["messages"][1]["content"]) + "</s>"
    targets = sum(label != -100 for labels in pool["labels"] for label in labels[1:])
    assert record["sets"]["pool"]["num_target_tokens"] == targets


def test_hashes_follow_the_content_not_the_place_or_the_order_of_keys(
    config: Config, tmp_path: Path
) -> None:
    row = answer("red", n=1)
    path = write(tmp_path / "x.jsonl", [row, dict(reversed(row.items())), answer("red", n=2)])
    pool, _ = prepare(changed(config, train=[path]))
    first, second, third = pool["sample_hash"]
    assert first == second != third and len(first) == 32
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    assert first == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_drop_instead_of_truncate_is_counted(config: Config) -> None:
    pool, record = prepare(changed(config, overlong="drop"))
    assert len(pool) == 18 and pool["sample_id"] == list(range(18))
    assert record["sets"]["pool"]["dropped"] == {
        "every answer is empty": 1,
        "longer than max_length": 1,
    }


def test_twice_the_same_to_the_byte(config: Config) -> None:
    first = (prepare(config), tree(Path(config.run_dir) / "prepared"))[1]
    second = (prepare(config), tree(Path(config.run_dir) / "prepared"))[1]
    assert first == second


# ---- faults --------------------------------------------------------------------------------------


def faults_of(config: Config) -> list[str]:
    """The faults the stage raises; whatever stood in the run directory must be untouched."""
    run = Path(config.run_dir)
    before = tree(run) if run.exists() else {}
    with pytest.raises(UserError) as caught:
        run_prepare(config, run)
    assert (tree(run) if run.exists() else {}) == before
    return caught.value.problems


def test_faults_of_all_sets_come_together_and_leave_earlier_work_whole(
    config: Config, tmp_path: Path
) -> None:
    prepare(config)
    bad = write(
        tmp_path / "bad.jsonl", [answer("yes"), {"messages": [{"role": "user", "content": "q"}]}]
    )
    worse = tmp_path / "worse.jsonl"
    worse.write_text('{"text": "a"}\n{"text"\n')
    found = faults_of(changed(config, train=[bad], validation={"domain": str(worse)}))
    assert len(found) == 2
    assert found[0].startswith(f"{bad}:2: ") and found[1].startswith(f"{worse}:2: ")


def test_quick_faults_name_the_key(config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bare").mkdir()
    broken = changed(
        config, train=["/none.jsonl"], validation={"domain": str(tmp_path / "empty.jsonl")}
    )
    broken = Config.model_validate(
        broken.model_dump() | {"model": {"path": str(tmp_path / "bare")}}
    )
    found = check_prepare(broken)
    assert [fault.partition(":")[0] for fault in found] == [
        "data.train",
        "data.validation.domain",
        "model.path",
    ]
    assert faults_of(broken) == found
    assert check_prepare(config) == []


def test_a_template_that_cannot_render_a_row_names_its_line(config: Config, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ raise_exception('no red') if 'red' in m['content'] }}"
        "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    model = config.model.model_dump() | {"chat_template": str(template)}
    path = write(tmp_path / "x.jsonl", [answer("blue"), answer("red")])
    (fault,) = faults_of(
        Config.model_validate(changed(config, train=[path]).model_dump() | {"model": model})
    )
    assert fault.startswith(f"{path}:2: ") and "no red" in fault


def test_a_pool_of_which_nothing_is_left_is_a_fault(config: Config, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [answer(""), answer(" ")])
    (fault,) = faults_of(changed(config, train=[path]))
    assert "none of 2 (every answer is empty: 2)" in fault


def test_reading_and_checking_import_no_torch(config: Config, tmp_path: Path) -> None:
    """A wrong file is reported without the seconds that torch takes to import."""
    code = (
        "import sys; from grads_ds.config.config import Config; from grads_ds.data.stage import"
        " check_prepare;check_prepare(Config.model_validate_json(sys.argv[1])); sys.exit('torch' in"
        " sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, config.model_dump_json()], cwd=REPO).returncode
        == 0
    )
