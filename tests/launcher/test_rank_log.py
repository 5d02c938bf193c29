"""A rank's log is kept small while the rank writes, without losing a line of the last two files,
and is shown whole.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grads_ds.launcher import rank_log
from grads_ds.launcher.job_outcome import DONE
from grads_ds.launcher.rank_log import LogReader, RankLog, older
from tests.launcher.jobs import folder_of, run_code


def test_no_line_is_lost_while_a_rank_writes_on(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.log"
    code = "import sys\nfor i in range(400000): sys.stdout.write(f'line {i}\\n')\n"
    with open(path, "ab") as log:
        writer = subprocess.Popen([sys.executable, "-uc", code], stdout=log, start_new_session=True)
    kept, reader, shown = RankLog(path, 200_000), LogReader(path), b""
    deadline = time.monotonic() + 60
    while writer.poll() is None and time.monotonic() < deadline:
        kept.keep_small(writer.pid)
        shown += reader.new()
        if kept.dropped > 1_000_000:
            writer.kill()
    writer.wait()
    shown += reader.new()
    assert kept.dropped > 0
    # what was shown is every line in order; so are the two files that are left
    numbers = [int(n) for n in re.findall(rb"line (\d+)\n", shown)]
    assert numbers == list(range(len(numbers))) and len(numbers) > 10_000
    both = older(path).read_bytes() + path.read_bytes()
    left = [int(n) for n in re.findall(rb"line (\d+)\n", both)]
    assert left == list(range(left[0], numbers[-1] + 1))
    assert b"older lines are in rank00000.log.1; the " in path.read_bytes()


def test_a_small_log_and_a_file_system_that_refuses_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rank00000.log"
    path.write_text("x" * 100)
    RankLog(path, 100).keep_small(os.getpid() + 2**20)
    assert path.read_text() == "x" * 100 and not older(path).exists()
    RankLog(tmp_path / "absent" / "log", 0).keep_small(os.getpid() + 2**20)


def test_the_supervisor_rotates_and_the_launcher_shows_everything_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_log, "LOG_BYTES", 3_000)
    code = "for i in range(90):\n    print(f'said {rank} {i}', flush=True); time.sleep(0.05)"
    code = code.replace("{i}", "{i} ' + 90 * 'x' + '")
    assert run_code(code, tmp_path, monkeypatch).status == DONE
    shown = capsys.readouterr().out
    assert re.findall(r"said 0 (\d+) ", shown) == [str(i) for i in range(90)]
    for rank in (0, 1):
        log = folder_of(tmp_path) / f"rank{rank:05d}.log"
        assert older(log).exists() and log.stat().st_size < 6_000
