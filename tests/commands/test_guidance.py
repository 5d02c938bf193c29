"""Help shows examples that parse, exit statuses and pages that exist; a problem names its page."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.cli import COMMANDS, main, parser
from grads_ds.commands.guidance import ELSEWHERE, EXAMPLES, PAGES, pages_for
from grads_ds.config.config import Config
from grads_ds.launcher.job_outcome import MEANINGS


def test_every_command_and_action_has_an_example() -> None:
    actions = {f"scores {name}" for name in ("show", "compare", "export", "verify")}
    assert set(EXAMPLES) == set(COMMANDS) | actions
    assert all(meaning for shown in EXAMPLES.values() for _, meaning in shown)


@pytest.mark.parametrize("command", EXAMPLES)
def test_every_example_is_one_that_the_command_line_takes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, _ in EXAMPLES[command]:
        words = shlex.split(f"{command} {arguments}".partition(" > ")[0])
        assert parser(words).parse_args(words).command == words[0]
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert f"grads-ds {command} {EXAMPLES[command][0][0]}" in told and "more: docs/" in told


def test_the_help_of_run_lists_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    told = " ".join(capsys.readouterr().out.split("exit statuses:")[1].split())
    assert [f"{number} {meaning}" in told for number, meaning in MEANINGS.items()].count(True) == (
        len(MEANINGS)
    )


def test_every_page_that_help_or_a_problem_names_exists() -> None:
    sections = [f"{key}: wanted x; found y; change it" for key in Config.model_fields]
    named = {*PAGES.values(), ELSEWHERE, *pages_for(sections, "run")}
    assert [page for page in sorted(named) if not (REPO / page).is_file()] == []
    assert set(PAGES) <= set(COMMANDS)


def test_a_problem_names_the_page_of_its_key_or_else_of_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pages_for(["select.budget: wanted x"], "run") == ["docs/selection.md"]
    assert pages_for(["model.lora.r: wanted x", "model.path: y"], "run") == [
        "docs/sft.md",
        "docs/config.md",
    ]
    assert pages_for(["a.jsonl:3: wanted x"], "prepare") == ["docs/prepare.md"]
    assert pages_for(["--hosts: wanted x", "sft.packing: y"], "run") == [
        "docs/launcher.md",
        "docs/sft.md",
    ]
    (tmp_path / "c.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {train: [a]}\nprob: 1\n")
    assert main(["prepare", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "  see docs/config.md"
