"""A file system that fails under a real stage is told as such: traceback, a status of its own, and
the next start goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from conftest import REPO
from scripts.faults import storage_errors


@pytest.mark.slow
def test_every_stage_tells_a_failing_disk_and_goes_on_when_it_is_whole() -> None:
    """An error of writing and one of reading for each stage, all stages forked from one process."""
    script = [sys.executable, str(REPO / "scripts/faults/storage_errors.py")]
    result = subprocess.run(
        [*script, "--draw", "--points", "1"],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [line for line in result.stdout.splitlines() if "| told 1 |" in line]
    assert {line.split(" | ")[0].strip("| ") for line in rows} == set(storage_errors.STAGES)
    assert sum(" reads " in line for line in rows) == len(storage_errors.STAGES)


def test_every_error_at_every_stage_is_on_record_and_was_told() -> None:
    found = json.loads(storage_errors.NUMBERS.read_text())
    cases = {(row["stage"], row["error"], row["calls"]) for row in found}
    assert len(cases) == len(storage_errors.STAGES) * len(storage_errors.ERRORS)
    for row in found:
        ends = row["ends"]
        assert ends.get(storage_errors.TOLD, 0) >= 1 and storage_errors.WRONG not in ends, row
    marks, page = storage_errors.MARKS, storage_errors.PAGE.read_text()
    assert f"{marks[0]}\n{storage_errors.table(found)}\n{marks[1]}" in page
