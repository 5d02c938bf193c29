"""The benchmark of fine-tuning runs both trainers on the same steps; their losses agree, and speed
is for a longer run to tell.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO

COMMAND = [
    sys.executable,
    str(REPO / "scripts/bench/bench_sft.py"),
    "--pairs",
    "2",
    "--layers",
    "1",
    "--width",
    "64",
]


@pytest.mark.slow
@pytest.mark.long
def test_ours_and_trl_train_the_same_steps_in_turn(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "bench.json"
    done = subprocess.run(
        [*COMMAND, "--vocabulary", "512", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    assert len(result["losses"]["ours"]) == len(result["losses"]["trl"]) == result["steps"] == 3
    assert result["largest_difference_of_losses"] < 1e-4
    for what in ("seconds", "cpu_seconds"):
        assert len(result[what]["ratios"]) == 2 and min(result[what]["ratios"]) > 0
