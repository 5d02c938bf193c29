"""`grads-ds stop` ends runs and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from grads_ds.cli import main
from grads_ds.commands import stop


@pytest.mark.parametrize("age", [0, 86400])
def test_stop_leaves_a_folder_that_is_no_run_alone(tmp_path: Path, age: int) -> None:
    """Other tools have files called lock.json, too."""
    theirs = tmp_path / "lock.json"
    theirs.write_text('{"name": "somebody else\'s"}')
    os.utime(theirs, (time.time() - age,) * 2)
    assert main(["stop", str(tmp_path)]) == 2
    assert "somebody" in theirs.read_text() and list(tmp_path.iterdir()) == [theirs]
    assert main(["stop", str(tmp_path / "nowhere")]) == 2


def test_a_checkpoint_has_more_than_a_minute_to_be_written() -> None:
    assert stop.WAIT_SECONDS > 60
