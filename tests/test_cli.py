"""Wrong input gives one clear message and status 2, no traceback, and changes no file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grads_ds.cli import main
from grads_ds.commands import export

REPO = Path(__file__).resolve().parent.parent
TURNS = [
    {"role": "user", "content": "what is the sky"},
    {"role": "assistant", "content": "the sky is blue"},
]


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good config and data, and a run directory whose first stage is done."""
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "GRADS_DS_LOCK"):
        monkeypatch.delenv(variable, raising=False)
    rows = [
        {"messages": [TURNS[0], TURNS[1] | {"content": f"the sky is blue {i}"}]} for i in range(20)
    ]
    for name in ("pool", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"train": ["pool.jsonl"], "validation": {"domain": "held.jsonl"}, "max_length": 64},
        "deepspeed": "zero3.json",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["prepare", "config.yaml"]) == 0
    return tmp_path


def digest(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def row(*turns: Any) -> str:
    return json.dumps({"messages": list(turns)})


def bare_model() -> str:
    Path("bare").mkdir()
    write("bare/config.json", '{"model_type": "llama"}')
    return "bare"


# name -> (the override, made inside the job's folder; what the message must name)
BAD = {
    "a missing file": (lambda: "data.train=[absent.jsonl]", "absent.jsonl"),
    "an empty file": (lambda: f"data.train=[{write('empty.jsonl', '')}]", "empty.jsonl"),
    "a broken line": (
        lambda: f"data.train=[{write('b.jsonl', row(*TURNS) + chr(10) + '{oops')}]",
        "b.jsonl:2",
    ),
    "no assistant turn": (lambda: f"data.train=[{write('n.jsonl', row(TURNS[0]))}]", "n.jsonl:1"),
    "an unknown role": (
        lambda: f"data.train=[{write('r.jsonl', row({'role': 'x', 'content': 'y'}))}]",
        "r.jsonl:1",
    ),
    "not text": (
        lambda: (
            f"data.train=[{write('t.jsonl', row(TURNS[0], {'role': 'assistant', 'content': 5}))}]"
        ),
        "t.jsonl:1",
    ),
    "binary": (
        lambda: (Path("bin.jsonl").write_bytes(b"\xff\xfe\x00\x80"), "data.train=[bin.jsonl]")[1],
        "bin.jsonl",
    ),
    "a file of an unknown kind": (lambda: f"data.train=[{write('rows.xyz', 'a')}]", "rows.xyz"),
    "no held-out file": (lambda: "data.validation={domain: nothing.jsonl}", "nothing.jsonl"),
    "a model that is not there": (lambda: "model.path=./absent-model", "absent-model"),
    "a hub model that is not there": (lambda: "model.path=nobody/nothing", "nobody/nothing"),
    "a model without weights": (lambda: f"model.path={bare_model()}", "weights"),
    "a budget of 0": (lambda: "select.budget=0", "select.budget"),
    "a budget of 7.5": (lambda: "select.budget=7.5", "select.budget"),
    "a budget above the pool": (lambda: "select.budget=700", "700"),
    "an unknown key": (lambda: "sft.epoch=1", "did you mean epochs?"),
    "an unknown method": (lambda: "select.method=gradss", "did you mean grads?"),
    "an unknown layer": (lambda: "probe.layers=[embeding]", "did you mean embedding?"),
    "a batch the ranks cannot share": (lambda: "sft.batch_size=33", "try 32 or 34"),
    "no DeepSpeed file": (lambda: "deepspeed=absent.json", "absent.json"),
    "a broken DeepSpeed file": (lambda: f"deepspeed={write('ds.json', '{')}", "ds.json:1"),
    "a DeepSpeed file that disagrees": (
        lambda: f"deepspeed={write('ds.json', json.dumps({'train_batch_size': 7}))}",
        "train_batch_size",
    ),
    "a hub id that cannot be fetched": (lambda: "data.train=[nobody/nothing]", "nobody/nothing"),
    "no run directory to write": (lambda: f"run_dir={write('a-file', '')}/run", "run_dir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(job: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    make, named = BAD[case]
    override = make()
    before = digest(job / "run")
    status = main(["run", "config.yaml", "--set", override, "--ranks", "2"])
    output = capfd.readouterr()
    assert status == 2, output.err
    assert named in output.err, output.err
    assert "Traceback" not in output.err + output.out
    assert digest(job / "run") == before


def test_every_fault_of_the_input_is_listed_at_once(
    job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["data.train=[absent.jsonl]", "model.path=./absent-model", "sft.batch_size=33"]
    assert (
        main(
            [
                "run",
                "config.yaml",
                "--ranks",
                "2",
                *(part for o in overrides for part in ("--set", o)),
            ]
        )
        == 2
    )
    message = capfd.readouterr().err
    assert all(word in message for word in ("absent.jsonl", "absent-model", "33"))


def test_a_stage_names_the_one_it_needs(job: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "config.yaml"]) == 2
    assert "wanted probe to be finished" in capfd.readouterr().err


def test_a_finished_stage_does_nothing_and_says_so(
    job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = digest(job / "run")
    assert main(["prepare", "config.yaml"]) == 0
    assert "prepare: done already, nothing to do" in capfd.readouterr().out
    assert digest(job / "run") == before
    assert main(["prepare", "config.yaml", "--set", "data.max_length=32"]) == 0
    assert "data.max_length was 64, now 32" in capfd.readouterr().out


def test_stages_in_the_wrong_order_are_refused(
    job: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "config.yaml", "--from", "sft", "--to", "select"]) == 2
    assert "swap them" in capfd.readouterr().err


ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202egpj.exe\x9b31m"


def test_text_from_data_reaches_the_terminal_printable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n{" + ESCAPES + "\n")
    config = {"run_dir": "run", "model": {"path": "m"}, "data": {"train": ["rows.jsonl", ESCAPES]}}
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert main(["prepare", "c.yaml"]) == 2

    def boom(*_: object) -> int:
        raise ValueError(ESCAPES)

    monkeypatch.setattr(export, "handle", boom)
    assert main(["export", "c.yaml", "--to", "trl", "--out", "x"]) == 1
    said = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e") & set(said.out + said.err)
    assert "\\x1b]0;owned" in said.err


def test_what_any_part_of_a_command_prints_is_printable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever prints it, a library too; progress bars still return to the begin of their line."""

    def chatty(*_: object) -> int:
        print(ESCAPES, "\x1b[2A\ud800")
        sys.stderr.writelines([ESCAPES, "\r 20 %|##"])
        return 0

    monkeypatch.setattr(export, "handle", chatty)
    assert main(["export", "c.yaml", "--to", "trl", "--out", "x"]) == 0
    said = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e\ud800") & set(said.out + said.err)
    assert "\r 20 %|##" in said.err and "\\x1b]0;owned" in said.err


LATIN = '{"caf\xe9": 1}\n'.encode("latin-1")


@pytest.mark.parametrize(
    "what, setting",
    [
        ("config", ""),
        ("deepspeed", "deepspeed=f"),
        ("template", "model.chat_template=f"),
        ("data", "data.train=[f]"),
        ("task", "evaluate.multiple_choice={t: f}"),
    ],
)
@pytest.mark.parametrize("content", [LATIN, "caf\u00e9: 1".encode("utf-16")])
def test_files_that_are_not_utf8_are_named_with_the_byte(
    what: str, setting: str, content: bytes, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = {"deepspeed": "f.json", "template": "f.jinja", "config": "f.yaml"}.get(what, "f.jsonl")
    Path(suffix).write_bytes(content)
    config = suffix if what == "config" else "config.yaml"
    words = ["--set", setting.replace("f", suffix)] if setting else []
    stages = [] if what == "task" else ["--to", "prepare"]
    assert main(["run", config, *words, *stages]) == 2
    said = capsys.readouterr().err
    assert "UTF-8" in said and suffix in said and "Traceback" not in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_failing_file_system_keeps_its_traceback_and_has_its_status(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(export, "handle", broken)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    assert main(["export", "c.yaml", "--to", "trl", "--out", "x"]) == (7 if full else 8)
    said = capsys.readouterr().err
    assert "Traceback" in said and os.strerror(number) in said and "in the input" not in said
