"""Small real jobs for the launcher's tests: ranks that run a few lines of Python under the
supervisor, without a model.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement, run_job
from grads_ds.launcher.job_outcome import Outcome
from grads_ds.launcher.timeouts import Timeouts
from tests import forked_ranks

REPO = Path(__file__).resolve().parents[2]
QUICK = Timeouts(start=60.0, lost=8.0, hang=600.0, grace=1.5, checkpoint=1.5, settle=2.5)
_BEGIN = """
import os, sys, time, signal
from grads_ds.distributed import heartbeat
heartbeat.start()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""


def run_code(
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int = 2,
    forked: bool = False,
    **place: Any,
) -> Outcome:
    """Run `code` on every rank through `run_job`; `rank`, `world` and `heartbeat` are defined in
    it. Forked ranks have imported torch, and so has DeepSpeed's launcher.
    """
    script = tmp_path / "rank code.py"
    script.write_text(_BEGIN + code)
    monkeypatch.setenv("PYTHONPATH", forked_ranks.python_path() if forked else str(REPO))
    if forked and place.get("backend") == "pdsh":
        monkeypatch.setattr(sys, "executable", forked_ranks.interpreter())
    settings = {"hosts": [Host("localhost", ranks)], "backend": "local", "limits": QUICK} | place
    return run_job("stage", [sys.executable, str(script)], Placement(**settings), tmp_path / "logs")


def folder_of(tmp_path: Path) -> Path:
    """The folder of the last job that `run_code` ran."""
    return max((tmp_path / "logs" / "stage").iterdir())


def left_behind(mark: str, seconds: float = 5.0) -> list[str]:
    """Command lines of processes of this machine that hold `mark` in them, and of Pythons that work
    below it.

    Those that are leaving get some seconds. A rank's own command line need not hold a path.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    line = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    where = str((entry / "cwd").readlink())
                except OSError:
                    continue
                if state != "Z" and (mark in line or ("python" in line and where.startswith(mark))):
                    found.append(line)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
