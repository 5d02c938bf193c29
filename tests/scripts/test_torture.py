"""A smaller draw of scripts/faults/torture.py: stages broken at some calls, bits flipped in every
kind of output; nothing silently wrong, stuck, or left behind. The whole of it is on record.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import REPO

STAGES = {"prepare", "merge", "select", "export", "report"}


@pytest.mark.slow
def test_a_broken_stage_ends_with_the_undisturbed_bytes() -> None:
    script = [sys.executable, str(REPO / "scripts/faults/torture.py")]
    result = subprocess.run(
        [*script, "--every", "53", "--flips", "1"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    stages = {line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()}
    assert stages >= STAGES
    assert "WRONG" not in result.stdout and "STUCK" not in result.stdout
