"""The truth about how ranks end: statuses, the first failure's own words, hangs, kills; and nothing
is left running.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from grads_ds.launcher.environment import write_private
from grads_ds.launcher.job_outcome import DONE
from tests.launcher.faults import told
from tests.launcher.jobs import QUICK, folder_of, left_behind, run_code


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path):  # type: ignore[no-untyped-def]
    yield
    assert left_behind(str(tmp_path)) == []


def test_ranks_know_who_they_are_and_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
from grads_ds.launcher.process_group import join
import torch.distributed as dist
join("gloo")
seen = [None] * world
dist.all_gather_object(seen, (rank, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]))
print("together", seen, flush=True)
dist.barrier(); dist.destroy_process_group()
"""
    assert run_code(code, tmp_path, monkeypatch, forked=True).status == DONE
    shown = capfd.readouterr().out
    assert shown.count("together [(0, '0', '2'), (1, '1', '2')]") == 1  # rank 0 narrates
    assert "together" in (folder_of(tmp_path) / "rank00001.log").read_text()
    assert "together" in (tmp_path / "logs/stage.log").read_text()


def test_environment_arrives_whole_and_is_not_left_lying_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "a 'b' \"c\"\n$HOME;id `x` \\ é"
    monkeypatch.setenv("MY_TOKEN", odd)
    monkeypatch.setenv("HF_HOME", "/some where")
    monkeypatch.setenv("SLURM_PROCID", "7")
    code = f"""
import json, glob, pathlib
folder = pathlib.Path({str(tmp_path)!r}) / f"seen{{rank}}.json"
deadline = time.time() + 20  # the file is gone while the ranks still work
while (left := glob.glob({str(tmp_path / "logs")!r} + "/*/*/environment.json")):
    assert time.time() < deadline
    time.sleep(0.05)
folder.write_text(json.dumps([dict(os.environ), left]))
"""
    assert run_code(code, tmp_path, monkeypatch).status == DONE
    for rank in range(2):
        seen, left = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert seen["MY_TOKEN"] == odd and seen["HF_HOME"] == "/some where"
        assert "SLURM_PROCID" not in seen and seen["RANK"] == str(rank)
        assert left == []
    write_private(tmp_path / "private", {"A": "b"})
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    files = [file for file in (tmp_path / "logs").rglob("*") if file.is_file()]
    assert files and not any("$HOME;id" in file.read_text(errors="replace") for file in files)


FAILURES = {
    "a rank that raises": "raise ValueError('my own words')",
    "a rank that is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "a rank that leaves": "os._exit(3)",
    "a file system that fails": "raise OSError(5, 'Input/output error')",
    "a mapped file that is cut short": (
        "import mmap; f = open(sys.path[0] + '/f', 'w+b'); f.truncate(8192);"
        " m = mmap.mmap(f.fileno(), 8192); f.truncate(0); m[0]"
    ),
    "a rank out of memory": (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); bytearray(2**31)"
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_first_failure_is_told_and_the_others_are_stopped(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 fails too, later and as a consequence; rank 1's own trouble is the outcome."""
    code = f"""
import traceback
from grads_ds.run_dir.storage import storage_status
try:
    if rank == 1:
        time.sleep(0.3)
        {FAILURES[case]}
    time.sleep(0.5 if rank == 0 else 60)
    raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
except Exception as error:
    heartbeat.failed(traceback.format_exc(), storage_status(error) or 1)  # as cli.py does
    os._exit(1)
"""
    began = time.monotonic()
    outcome = run_code(code, tmp_path, monkeypatch, ranks=3)
    told(
        case,
        " ".join(f"{outcome.sentence} {outcome.error}".split()),
        outcome.status,
        time.monotonic() - began,
    )
    assert outcome.rank == 1


def test_an_error_with_status_2_is_the_users_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run_code(
        "heartbeat.failed('data: wanted more', 2); os._exit(2)", tmp_path, monkeypatch
    )
    assert (outcome.status, outcome.error) == (2, "data: wanted more")


def test_progress_keeps_a_slow_job_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "for step in range(10):\n    heartbeat.beat('steps', step, 8)\n    time.sleep(0.6)"
    assert run_code(code, tmp_path, monkeypatch, limits=replace(QUICK, hang=4.0)).status == DONE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_rank_even_those_that_ignore_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[0]])
heartbeat.beat("waiting")
time.sleep(600)
"""

    def interrupt() -> None:
        for _ in range(200):
            time.sleep(0.1)
            records = [
                json.loads(f.read_text() or "{}")
                for f in (tmp_path / "logs").glob("stage/*/rank*.json")
            ]
            if len(records) == 2 and all("progress" in record for record in records):
                break
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    outcome = run_code(code, tmp_path, monkeypatch)
    assert outcome.status == 128 + number
    if number == signal.SIGINT:
        told("an interrupt", outcome.sentence, outcome.status, time.monotonic() - began)


def test_a_killed_supervisor_takes_its_rank_along_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "time.sleep(0.5)\nif rank == 1: os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)"
    began = time.monotonic()
    outcome = run_code(code, tmp_path, monkeypatch, limits=replace(QUICK, lost=4.0))
    told("a supervisor that is killed", outcome.sentence, outcome.status, time.monotonic() - began)


def test_a_rank_stopped_from_outside_is_a_preemption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "time.sleep(0.5)\nif rank == 1: os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    began = time.monotonic()
    outcome = run_code(code, tmp_path, monkeypatch)
    told("a preempted host", outcome.sentence, outcome.status, time.monotonic() - began)
