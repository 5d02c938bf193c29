"""The shell scripts parse, refuse what they do not know, and leave a finished install alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((REPO / "scripts").glob("*.sh")) + [REPO / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert "set -euo pipefail" in script.read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what install.sh reads, in a path with a space."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/install.sh"):
        shutil.copy(REPO / name, root / name)
    return root


def fake_python(root: Path) -> Path:
    """An interpreter that makes environments holding itself and writes its pip calls to pip.log."""
    python = root.parent / "python3.11"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n'
        '    echo "command = x $3" > "$3/pyvenv.cfg"\n'
        f'elif [ "$1 $2" = "-m pip" ]; then echo "$@" >> "{root}/pip.log"; exit'
        ' "${PIP_STATUS:-0}"\n'
        'elif [[ "$2" == *find_spec* ]]; then exit 0\n'
        'elif [[ "$2" == *sys.executable* ]]; then echo "$0"\n'
        'elif [ "$1" = -c ]; then exit 0\n'
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    python.chmod(0o755)
    return python


def install(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(fake_python(root)), **variables}
    command = ["bash", str(root / "scripts" / "install.sh"), *arguments]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=120, check=False
    )


def calls(root: Path) -> int:
    log = root / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_second_install_is_skipped_and_development_tools_are_added_once(checkout: Path) -> None:
    assert install(checkout).returncode == 0
    again = install(checkout)
    assert again.returncode == 0
    assert "skipped" in again.stdout
    assert calls(checkout) == 1


def test_changed_pins_install_again(checkout: Path) -> None:
    install(checkout)
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert "skipped" not in install(checkout).stdout
    assert calls(checkout) == 2


def test_failed_install_says_so_and_is_finished_by_the_next(checkout: Path) -> None:
    failed = install(checkout, PIP_STATUS="1")
    assert failed.returncode == 1
    assert "start again" in failed.stderr
    assert "skipped" not in install(checkout).stdout
    assert "skipped" in install(checkout).stdout


def test_half_made_or_moved_environment_is_made_again(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)  # interrupted before pyvenv.cfg was written
    first = install(checkout)
    assert first.returncode == 0, first.stderr
    assert "making .venv again" in first.stdout
    moved = checkout.with_name("another name")
    checkout.rename(moved)
    assert "making .venv again" in install(moved).stdout


def test_unknown_argument_is_refused(checkout: Path) -> None:
    refused = install(checkout, "--everything")
    assert refused.returncode == 2
    assert "--dev" in refused.stderr


def test_no_new_enough_python_is_said_in_one_line(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "id", "env", "g++", "ninja"):
        found = shutil.which(name) or "/bin/true"
        (tools / name).symlink_to(found)
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        old = tools / name
        old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
        old.chmod(0o755)
    script = (checkout / "scripts" / "install.sh").read_text().replace(" /usr/bin/python3;", ";")
    (checkout / "scripts" / "install.sh").write_text(script)
    command = [str(tools / "bash"), str(checkout / "scripts" / "install.sh")]
    result = subprocess.run(
        command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "wanted Python 3.11 or newer; found Python 3.9.2" in result.stderr
