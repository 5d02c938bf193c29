"""Every command says on a terminal what to do next, and nothing where there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grads_ds.cli import COMMANDS, main, parser
from grads_ds.commands.next_step import next_step
from grads_ds.run_dir.lock import lock
from grads_ds.run_dir.units import mark_done
from tests.commands.test_watching import in_terminal

CONFIG = """\
run_dir: {run}
model: {{path: m}}
data: {{train: [a.jsonl]}}
"""
# a command line of every command; {c} is a config, {r} its run directory
LINES = {
    "init": "init a.jsonl --model m --out {c}",
    "run": "run {c}",
    **{name: f"{name} {{c}}" for name in ("prepare", "probe", "select", "sft", "evaluate")},
    "report": "report {c}",
    "compare": "compare {r} {r}",
    "doctor": "doctor {c}",
    "plan": "plan {c}",
    "scores": "scores show {r}",
    "status": "status {r}",
    "check": "check {r}",
    "stop": "stop {r}",
    "export": "export {c} --to trl --out x",
    "merge": "merge {r} --alpha 0.5 --out x",
    "config": "config --schema",
}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    run = tmp_path / "my run"
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(run=run))
    mark_done(run, "prepare", {}, [], 3.0)
    return {"c": str(config), "r": str(run)}


def test_every_command_has_a_next_step(given: dict[str, str]) -> None:
    assert LINES.keys() == COMMANDS.keys()
    for line in LINES.values():
        words = [word.format(**given) for word in line.split()]
        args = parser(words).parse_args(words)
        said = next_step(args, 0)
        assert said and "{" not in said, line
        # what it names is a command
        for name in re.findall(r"grads-ds (\S+)", said):
            assert name in COMMANDS, said


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_new_configuration_is_planned_for_the_gpus_and_then_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    from grads_ds.first_config import machine

    monkeypatch.setattr(machine, "this_machine", lambda: machine.Machine(gpus, "H100", 80.0, 8))
    words = ["init", "a.jsonl", "--model", "m", "--out", str(tmp_path / "my run.yaml")]
    said, place = next_step(parser(words).parse_args(words), 0), f"'{tmp_path}/my run.yaml'"
    plan = f"grads-ds plan {place} --cluster 1x2 --gpu-memory 80 --calibrate, then "
    assert said == (plan if gpus else "") + f"grads-ds run {place}"


def test_paths_in_it_can_be_given_to_a_shell(given: dict[str, str]) -> None:
    words = ["report", given["c"]]
    assert f"open '{given['r']}'/report.html" in next_step(parser(words).parse_args(words), 0)


def test_a_failed_run_is_told_where_to_look_and_to_start_again(given: dict[str, str]) -> None:
    args = parser(["run", given["c"]]).parse_args(["run", given["c"]])
    assert f"grads-ds status '{given['r']}'" in next_step(args, 1)
    assert "what is finished stays" in next_step(args, 4)
    assert next_step(args, 2).startswith("change what is listed above")
    assert next_step(args, 130) == ""  # said already


def test_it_is_the_last_line_on_a_terminal_alone(
    given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"from grads_ds.cli import main\nraise SystemExit(main(['status', {given['r']!r}]))"
    assert "--watch" not in in_terminal(code)[0]  # nobody is at work: there is nothing to follow
    with lock(Path(given["r"]), "probe"):
        said, status = in_terminal(code)
    assert status == 0
    assert said.splitlines()[-1] == f"next: grads-ds status '{given['r']}' --watch follows it"
    assert main(["status", given["r"]]) == 0
    both = capsys.readouterr()
    assert "next:" not in both.out + both.err
