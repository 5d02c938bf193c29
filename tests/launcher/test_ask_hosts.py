"""What a host answers is found in whatever its login scripts print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from grads_ds.launcher.ask_hosts import ask_by_ssh
from grads_ds.launcher.backends import SUPERVISOR
from grads_ds.launcher.hosts import Host

LOOK = [sys.executable, str(SUPERVISOR.parent / "doctor/on_host.py"), "--quick"]


SAID = {
    "text before": "echo Welcome; {answer}",
    "text after": "{answer}; echo; echo 'Logged out. Have a nice day {{}}'",
    "text on the same line": "printf 'Motto: '; {answer} | tr -d '\\n'; printf ' bye'",
}


@pytest.mark.parametrize("case", SAID)
def test_what_login_scripts_print_hides_no_answer(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ssh is a stand-in that runs the command here, with a login shell that talks."""
    answer = 'sh -c "$command"'
    (tmp_path / "ssh").write_text(
        f"#!/bin/sh\nfor command do :; done\n{SAID[case].format(answer=answer)}\n"
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    question = json.dumps({"run_dir": str(tmp_path), "files": []})
    (found,) = ask_by_ssh([Host("node", 1)], LOOK, question).values()
    assert not isinstance(found, str) and found["python"], found


def test_a_login_that_gives_no_answer_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\necho This account is for tunnels only\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (told,) = ask_by_ssh([Host("node", 1)], LOOK, "{}").values()
    assert isinstance(told, str) and "tunnels only" in told and "login scripts" in told
    assert "file system" not in told
