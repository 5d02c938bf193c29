"""A run that is detached goes on by itself; status and stop reach it; what keeps it from starting
is shown where it was started.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

from grads_ds.cli import main, parser
from grads_ds.commands import run as run_command
from grads_ds.commands.detach import LOG, start_detached
from grads_ds.run_dir.ownership import claim
from tests.launcher.jobs import left_behind

HOLD = """
import sys, time
from pathlib import Path
from grads_ds.config.errors import StoppedBySignal
from grads_ds.run_dir.lock import lock
try:
    with lock(Path(sys.argv[1]), "grads-ds run"):
        print("working", flush=True)
        time.sleep(600)
except StoppedBySignal:
    sys.exit(143)
"""


def test_it_works_in_a_session_of_its_own_until_it_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    claim(run)
    assert start_detached([sys.executable, "-c", HOLD, str(run)], run) == 0
    said = capsys.readouterr().err
    stop = f"grads-ds stop '{run}'"  # as a shell takes it
    assert said.splitlines()[-1].endswith(stop)
    assert start_detached([sys.executable, "-c", HOLD, str(run)], run) != 0
    assert stop in capsys.readouterr().err
    pid = int(said.split("process ")[1].split()[0])
    assert os.getsid(pid) == pid and str(run / LOG) in said
    assert main(["status", str(run)]) == 0
    assert "grads-ds run on" in capsys.readouterr().out
    assert main(["stop", str(run), "--wait-seconds", "30"]) == 0
    assert "working" in (run / LOG).read_text()
    with contextlib.suppress(ChildProcessError):  # reaped already
        os.waitpid(pid, 0)
    assert left_behind(str(run)) == []


def test_what_ends_it_before_it_works_is_shown_with_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / LOG).write_text("of an earlier start\n")
    code = "import sys; print('run_dir: held by \\x1b[2J'); sys.exit(2)"
    assert start_detached([sys.executable, "-c", code], tmp_path) == 2
    said = capsys.readouterr().err
    assert said == "run_dir: held by \\x1b[2J\n"
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert start_detached([sys.executable, "-c", code], tmp_path) == 137


def test_the_words_it_is_started_with_are_the_same_command() -> None:
    given = ["run", "c.yaml", "--set", "seed=3", "--to", "sft", "--elastic", "--max-restarts", "2"]
    given += ["--hosts", "h", "--include", "a@b", "--exclude", "c", "--ranks", "4"]
    given += ["--backend", "pdsh", "--ports", "29500-29600", "--hang-seconds", "70"]
    given += ["--interface", "eth1", "--ssh-port", "2222", "--master-addr", "node1", "--detach"]
    args = parser(given).parse_args(given)
    words = run_command.same_words(args)
    again = parser(words).parse_args(words)
    assert vars(again) == vars(args) | {"detach": False}


def test_wrong_input_is_told_where_it_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {tmp_path}/none}}\ndata: {{train: [a.jsonl]}}\n"
    )
    assert main(["run", str(tmp_path / "c.yaml"), "--ranks", "1", "--detach"]) == 2
    assert "a.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run" / LOG).exists()
    words = ["run", str(tmp_path / "c.yaml"), "--backend", "kubernetes", "--detach"]
    assert main(words) == 2
    assert "needs no terminal" in capsys.readouterr().err
