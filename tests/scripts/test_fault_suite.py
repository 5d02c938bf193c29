"""A small draw of the fault suite: a recording that is struck once or, in the long one, a probe
with its training that is struck three times, ends with the undisturbed table.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO
from tests import forked_ranks


def counted(line: str) -> dict[str, int]:
    """The counts of the suite's last line."""
    return {name: int(value) for name, value in re.findall(r"([a-z][a-z ]+?) (\d+)[,;]", line)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "faults"), [("record", 1), pytest.param("train, record", 3, marks=pytest.mark.long)]
)
def test_a_probe_that_is_struck_loses_and_doubles_nothing(
    tmp_path: Path, mode: str, faults: int
) -> None:
    command = [
        sys.executable,
        "scripts/faults/suite.py",
        "--faults",
        str(faults),
        "--seed",
        "4",
        "--modes",
        mode,
    ]
    done = subprocess.run(
        [*command, "--output", tmp_path / "said"],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": forked_ranks.python_path(), "FORK_ALL": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = counted((tmp_path / "said").read_text().splitlines()[-1])
    assert counts["faults injected"] == faults and counts["runs resumed"] >= faults
    assert counts["rows lost"] == counts["rows doubled"] == 0
    assert counts["tables finished"] == counts["equal to the bit"] >= 1


def test_fifty_faults_are_on_record_and_every_table_is_equal_to_the_bit() -> None:
    said = (REPO / "docs/results/fault_suite.txt").read_text()
    counts = counted(said.splitlines()[-1])
    assert counts["faults injected"] >= 50 and counts["rows lost"] == counts["rows doubled"] == 0
    assert counts["tables finished"] == counts["equal to the bit"] >= 1
    tables = re.findall("table finished: (.*)", said)
    assert tables == ["equal to the bit, lost 0, doubled 0"] * counts["tables finished"]
