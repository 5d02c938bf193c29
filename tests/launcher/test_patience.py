"""A file system that stalls ends no healthy job: time in which the launcher or a supervisor was
itself held up counts for nobody's silence.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from grads_ds.launcher.job_outcome import DONE, LOST
from tests.launcher.jobs import QUICK, left_behind, run_code

STALL = 9.0
SHORT = replace(QUICK, lost=3.0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose writes `fsfreeze` can hold up."""
    if os.geteuid() or not all(map(shutil.which, ("fsfreeze", "mkfs.ext4", "mount"))):
        pytest.skip("freezing a file system needs root and util-linux")
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 48 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(folder)]).returncode:
        pytest.skip("this machine mounts no file")
    try:
        yield folder
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(folder)], stderr=subprocess.DEVNULL)
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_that_stalls_kills_no_healthy_job(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a host may be silent, and than supervisors wait for a silent launcher."""
    assert 2 * SHORT.lost < STALL
    # a shell of its own thaws it, whatever becomes of this process
    freeze = f"sleep 3; fsfreeze --freeze {disk}; sleep {STALL}; fsfreeze --unfreeze {disk}"
    subprocess.Popen(["sh", "-c", freeze], start_new_session=True, cwd="/")
    code = "for step in range(30):\n    heartbeat.beat('steps', step, 30)\n    time.sleep(0.6)"
    began = time.monotonic()
    outcome = run_code(code, disk, monkeypatch, limits=SHORT)
    assert outcome.status == DONE, outcome
    assert time.monotonic() - began > STALL
    assert left_behind(str(disk)) == []


def test_a_rank_that_is_lost_is_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "time.sleep(0.5)\nif rank == 1: os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)"
    assert run_code(code, tmp_path, monkeypatch, limits=SHORT).status == LOST
