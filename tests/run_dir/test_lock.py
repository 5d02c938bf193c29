"""Two are never at work in one run directory: not from other pid namespaces, under clocks that
differ, or at the same moment; and whoever loses the lock, or is asked to stop, stops.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.errors import UserError
from grads_ds.launcher.job_outcome import LOCK_LOST
from grads_ds.run_dir import lock_file, processes
from grads_ds.run_dir.lock import lock, lock_holder
from grads_ds.run_dir.processes import boot_id
from grads_ds.run_dir.publish import publish_json
from tests.launcher.faults import told


def test_a_live_holder_in_another_pid_namespace_keeps_its_lock(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("namespaces need root and unshare")
    hold("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    record = json.loads((tmp_path / "lock.json").read_text())
    assert record["pid"] < 100  # a number that here is another process's, or nobody's
    with pytest.raises(UserError, match="in use by grads-ds select"), lock(tmp_path, "second"):
        pass
    assert lock_holder(tmp_path) is not None


def test_a_clock_that_is_ahead_takes_no_lock_from_a_live_holder(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold()
    age = lock_file.age
    for skew in (3600.0, -3600.0):  # ahead, and behind
        monkeypatch.setattr(lock_file, "age", lambda *paths, s=skew: age(*paths) + s)
        with pytest.raises(UserError, match="in use by"), lock(tmp_path, "second"):
            pass


def test_a_clock_that_is_behind_keeps_no_dead_lock_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of another host that nobody touches, stamped an hour from now, is taken over."""
    monkeypatch.setattr(lock_file, "STALE_SECONDS", 1.0)
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": 1}))
    os.utime(path, (time.time() + 3600,) * 2)
    with lock(tmp_path, "second"):
        pass


def test_a_killed_holder_is_followed_at_once(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = hold()
    process.kill()
    process.wait()
    began = time.monotonic()
    with lock(tmp_path, "second"):
        assert time.monotonic() - began < 1


def _take_often(folder: Path, rounds: int, barrier: object, won: object, boot: str) -> None:
    sys.stderr, processes.boot_id = io.StringIO(), lambda: boot
    lock_file.BEAT_SECONDS = 0.02
    for number in range(rounds):
        barrier.wait(30)  # type: ignore[attr-defined]
        try:
            with lock(folder / str(number), "race"):
                inside = os.open(folder / f"{number}.inside", os.O_CREAT | os.O_EXCL)
                time.sleep(0.01)
                os.close(inside)
                os.unlink(folder / f"{number}.inside")
                won.put((number, "won"))  # type: ignore[attr-defined]
        except FileExistsError:
            won.put((number, "two at once"))  # type: ignore[attr-defined]
        except UserError:
            pass


@pytest.mark.parametrize("boots", [[boot_id()] * 3, ["one host", "another", "a third"]])
def test_of_starts_at_the_same_moment_one_takes_a_dead_lock(tmp_path: Path, boots: Any) -> None:
    """Of a process of this host that has ended; of a silent host, by launchers of several hosts."""
    context = multiprocessing.get_context("fork")
    rounds = 100 if len(set(boots)) == 1 else 30  # a silent host is watched for some beats first
    barrier, won = context.Barrier(len(boots)), context.Queue()
    for number in range(rounds):
        (tmp_path / str(number)).mkdir()
        record = {"token": "x", "pid": 2**22 + 1, "process": f"{boot_id()}:1"}
        record["namespace"] = os.readlink("/proc/self/ns/pid")
        (tmp_path / str(number) / "lock.json").write_text(json.dumps(record))
        os.utime(tmp_path / str(number) / "lock.json", (1, 1))
    workers = [
        context.Process(target=_take_often, args=(tmp_path, rounds, barrier, won, boot))
        for boot in boots
    ]
    for worker in workers:
        worker.start()
    results = []
    while any(worker.is_alive() for worker in workers) or not won.empty():
        if not won.empty():
            results.append(won.get())
        else:
            time.sleep(0.01)
    assert {number for number, _ in results} == set(range(rounds))
    assert {how for _, how in results} == {"won"}


def test_a_holder_that_lost_its_lock_stops_and_says_so(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, began = hold(), time.monotonic()
    theirs = {"token": "other", "host": "elsewhere", "pid": 7, "what": "grads-ds run"}
    (tmp_path / "new").write_text(json.dumps(theirs))
    (tmp_path / "new").replace(tmp_path / "lock.json")
    message = process.communicate(timeout=30)[1]
    told("a lock that is lost", message, process.returncode, time.monotonic() - began)
    assert process.returncode == LOCK_LOST
    assert json.loads((tmp_path / "lock.json").read_text()) == theirs


def test_a_lock_that_cannot_be_written_whole_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"), lock(tmp_path, "on a full disk"):
            pass
    assert list(tmp_path.iterdir()) == []
    with lock(tmp_path, "the next job"):
        pass


def test_a_second_start_is_refused_with_the_holders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock(tmp_path, "the first job"):
        with lock(tmp_path, "its child"):  # started by the holder: the right is inherited
            pass
        assert (tmp_path / "lock.json").exists()
        monkeypatch.delenv("GRADS_DS_LOCK")
        with pytest.raises(
            UserError, match=rf"the first job \(pid {os.getpid()} on {socket.gethostname()}"
        ):
            with lock(tmp_path, "the second job"):
                pass
    assert not (tmp_path / "lock.json").exists()


def test_the_lock_of_a_silent_host_is_taken_over(tmp_path: Path) -> None:
    publish_json(
        tmp_path / "lock.json", {"token": "x", "host": "elsewhere", "pid": 1, "what": "lost"}
    )
    with pytest.raises(UserError, match="lost"), lock(tmp_path, "early"):
        pass
    os.utime(tmp_path / "lock.json", (1, 1))
    with lock(tmp_path, "late"):
        pass
