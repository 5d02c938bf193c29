"""A smaller draw of scripts/faults/torture.py: stages broken at some calls, bits flipped in every
kind of output; nothing silently wrong, stuck, or left behind. The whole of it is on record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from scripts.faults import torture

STAGES = {"prepare", "merge", "select", "export", "report"}


@pytest.mark.slow
def test_a_broken_stage_ends_with_the_undisturbed_bytes(tiny_model: Path) -> None:
    script = [sys.executable, str(REPO / "scripts/faults/torture.py")]
    result = subprocess.run(
        [*script, "--every", "53", "--flips", "1", "--model", str(tiny_model)],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    stages = {line.split(" | ")[0].strip("| ") for line in result.stdout.splitlines()}
    assert stages >= STAGES
    assert "WRONG" not in result.stdout and "STUCK" not in result.stdout


def test_every_call_of_every_stage_is_on_record_and_ended_well() -> None:
    record = json.loads(torture.NUMBERS.read_text())
    page = torture.PAGE.read_text()
    points, flips = record["crash points"], record["flips"]
    assert set(points) == STAGES
    for found in points.values():
        for kind, *_ in torture.ATTEMPTS:
            assert found["every"] == 1 and found[kind] == {torture.WHOLE: found["calls"]}
    assert {"scores/table.parquet", "state/*.json", "prepared/**/*.arrow"} <= set(flips)
    for ends in flips.values():
        assert set(ends) <= set(torture.GOOD) and sum(ends.values()) >= 200
    for marks, table in (
        (torture.CRASHES, torture.crash_table(points)),
        (torture.FLIPS, torture.flip_table(flips)),
    ):
        assert f"{marks[0]}\n{table}\n{marks[1]}" in page
