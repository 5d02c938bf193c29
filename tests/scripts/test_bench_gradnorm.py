"""The benchmark of gradient norms runs every mode and publishes its table; its speeds are for quiet
machines to tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from tests import forked_ranks

COMMAND = [sys.executable, str(REPO / "scripts/bench/bench_gradnorm.py")]


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": forked_ranks.python_path(), "FORK_ALL": "1"}
    return subprocess.run([*COMMAND, *options], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_mode_runs_and_is_published(tmp_path: Path) -> None:
    options = ["--shapes", "tiny", "--rounds", "1", "--no-memory", "--out", str(tmp_path)]
    done = bench(*options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "bench_gradnorm.json").read_text())["results"][0]
    assert len(result["modes"]) + len(result["failed"]) == 9 and set(result["failed"]) <= {
        "Opacus ghost clipping"
    }
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in result["modes"].values())
    assert all(
        f"| {mode} |" in (tmp_path / "bench_gradnorm.md").read_text() for mode in result["modes"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_peak_memory_of_one_mode() -> None:
    done = bench("--memory", "tiny", "ours: head")
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < float(done.stdout) < 500
