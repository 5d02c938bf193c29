"""Exporting a ZeRO-3 model takes the memory of a shard or two; the script that measures it sees a
model where one is gathered whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked_ranks

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory"
)
def test_an_export_grows_by_shards_and_not_by_the_model() -> None:
    call = [
        sys.executable,
        str(REPO / "scripts/bench/measure_export.py"),
        "--layers",
        "8",
        "--shard-mb",
        "8",
    ]
    environment = os.environ | {"PYTHONPATH": forked_ranks.python_path(), "FORK_ALL": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    model, (writer, other) = found["model_mb"], found["growth_mb"]["export"]
    assert found["shards"] > 5 and model > 80
    assert writer < 25 and other < 25
    assert min(found["growth_mb"]["at once"]) > 0.9 * model
