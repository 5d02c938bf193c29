"""Every command answers --help, and the command line names the stages in order."""

from __future__ import annotations

import pytest

from grads_ds import cli
from grads_ds.cli import main
from grads_ds.flow.stages import STAGE_NAMES


def test_commands_of_the_stages_are_the_stages() -> None:
    """The command line names them itself, so that --help imports none of them."""
    stages = [name for name, (add, _) in cli.COMMANDS.items() if add.startswith("run:")]
    assert stages == ["run", *STAGE_NAMES]
    assert " -> ".join(STAGE_NAMES) in " ".join(cli.parser([]).format_help().split())


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and f"grads-ds {name}" in capsys.readouterr().out
