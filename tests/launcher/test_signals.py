"""A stop reaches every rank in time for its checkpoint, wherever it begins; what was ignored when
the program began stays ignored; text of a rank does not act on the terminal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.launcher.job_outcome import DONE, STOPPED
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK, left_behind, run_code

# a rank that takes longer for its checkpoint than a failed job's ranks get, and less than a stop
CHECKPOINT = """
def stop(*_):
    time.sleep(2.5)
    open(os.path.join(sys.path[0], f"checkpoint{rank}"), "w").close()
    os._exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGUSR1, stop)
heartbeat.beat("training")
time.sleep(600)
"""
PATIENT = replace(QUICK, checkpoint=15.0)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path):  # type: ignore[no-untyped-def]
    yield
    assert left_behind(str(tmp_path)) == []


def once_training(tmp_path: Path, act: Callable[[list[dict[str, int]]], object]) -> None:
    """Call `act` with the ranks' records as soon as every rank has reported progress."""

    def wait() -> None:
        for _ in range(600):
            files = (tmp_path / "logs").glob("stage/*/rank*.json")
            records = [json.loads(file.read_text() or "{}") for file in sorted(files)]
            if len(records) == 2 and all("progress" in record for record in records):
                act(records)
                return
            time.sleep(0.05)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize(
    "target, number",
    [
        ("launcher", signal.SIGUSR1),
        ("supervisor", signal.SIGTERM),
        ("pid", signal.SIGTERM),
        pytest.param("launcher", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("supervisor", signal.SIGUSR1, marks=pytest.mark.long),
        pytest.param("pid", signal.SIGUSR1, marks=pytest.mark.long),
    ],
)
def test_a_stop_gives_every_rank_its_checkpoint(
    target: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal to the launcher, to one rank's supervisor (its host is preempted), or to one rank
    itself (Slurm signals every process of a step).
    """
    once_training(tmp_path, lambda records: os.kill(records[1].get(target, os.getpid()), number))
    outcome = run_code(CHECKPOINT, tmp_path, monkeypatch, limits=PATIENT)
    assert outcome.status == STOPPED
    assert {file.name for file in tmp_path.glob("checkpoint*")} == {"checkpoint0", "checkpoint1"}


def test_a_rank_that_is_signalled_before_it_trains_is_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in it heeds the signal yet: Slurm's warning is no crash."""
    once_training(tmp_path, lambda records: os.kill(records[1]["pid"], signal.SIGUSR1))
    code = "heartbeat.beat('loading')\ntime.sleep(600)"
    assert run_code(code, tmp_path, monkeypatch, limits=QUICK).status == STOPPED


def test_a_second_signal_ends_the_wait_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    once_training(tmp_path, twice)
    code = CHECKPOINT.replace("sleep(2.5)", "sleep(600)")
    began = time.monotonic()
    outcome = run_code(code, tmp_path, monkeypatch, limits=replace(QUICK, checkpoint=300.0))
    assert outcome.status == STOPPED and time.monotonic() - began < 60


JOB = """
import signal, sys; sys.path[:0] = [{repo!r}, {tests!r}]
signal.signal(signal.SIGHUP, signal.{given})
from pathlib import Path
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement, run_job
from tests.launcher.jobs import QUICK
place = Placement([Host("localhost", 1)], "local", limits=QUICK)
words = [sys.executable, "-c", "import time; time.sleep(3)", {here!r}]
outcome = run_job("stage", words, place, Path({here!r}))
print(outcome.sentence)
sys.exit(outcome.status)
"""


@pytest.mark.parametrize("given, status", [("SIG_IGN", DONE), ("SIG_DFL", 129)])
def test_a_terminal_that_is_gone_ends_a_run_unless_nohup_started_it(
    given: str, status: int, tmp_path: Path
) -> None:
    code = JOB.format(repo=str(REPO), tests=str(REPO / "tests"), given=given, here=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not any('"running"' in f.read_text() for f in tmp_path.glob("stage/*/rank*.json")):
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGHUP)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == status
    if status:
        told("a terminal that is gone", output, process.returncode, time.monotonic() - began)


def test_a_ranks_text_does_not_act_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Progress bars redraw their line; nothing else of what a rank prints is an order."""
    code = 'print("10 %\\r20 %\\n\\x1b]0;title\\x07\\x1b[2J \\u202e é", flush=True)'
    assert run_code(code, tmp_path, monkeypatch, ranks=1).status == DONE
    for shown in (capfd.readouterr().out, (tmp_path / "logs/stage.log").read_bytes().decode()):
        assert "10 %\r20 %\n" in shown and " é" in shown
        assert "\\x1b[2J" in shown and not set(shown) & set("\x1b\x07\u202e")
