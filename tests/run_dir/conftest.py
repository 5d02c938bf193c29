"""A process that holds a run directory, for the tests of locks and of who is told to stop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.run_dir import lock_file
from grads_ds.run_dir.lock import LOCK_VARIABLE

# holds the run directory as a command of the program would, until its work is over or it is stopped
HOLD = """
import sys, time
from pathlib import Path
from grads_ds import cli
from grads_ds.commands import status
from grads_ds.run_dir import lock, lock_file
lock_file.BEAT_SECONDS = 0.1
def work(args):
    with lock.lock(Path(sys.argv[1]), "grads-ds select"):
        print("held", flush=True)
        time.sleep(60)
    return 0
status.handle = work
sys.exit(cli.main(["status", sys.argv[1]]))
"""


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCK_VARIABLE, raising=False)
    monkeypatch.setattr(lock_file, "BEAT_SECONDS", 0.1)


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds `tmp_path`, behind the given words, and waits until it does."""
    started: list[subprocess.Popen[str]] = []

    def start(*before: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, "-c", HOLD, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
