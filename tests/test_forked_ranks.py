"""A forked rank stands for a process of its own: place, variables, streams, signals and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked_ranks

SAYS = r"""
import multiprocessing, os, platform, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"told to end\n"), os._exit(9)))
print(os.getcwd(), os.environ["GIVEN"], sys.argv[1:], sys.stdin.read(), "torch" in sys.modules)
print(multiprocessing.get_start_method())
print(os.getpid(), flush=True)
if "stays" in sys.argv:
    time.sleep(60)
sys.exit(3)
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(SAYS)
    (folder / "input").write_text("handed down")
    with open(folder / "input") as file:
        return subprocess.Popen(
            [sys.executable, "rank.py", *arguments],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": forked_ranks.python_path(), "RANK": "0", "GIVEN": "a 'value'"},
            stdin=file,
            stdout=subprocess.PIPE,
            text=True,
        )


def test_it_has_the_place_the_streams_and_the_end_of_its_own_process(tmp_path: Path) -> None:
    process = start(tmp_path, "one", "two words")
    said = process.communicate(timeout=60)[0].splitlines()
    assert said[0] == f"{tmp_path} a 'value' ['one', 'two words'] handed down True"
    assert said[1] == "fork"  # not the server's way
    assert int(said[2]) != process.pid and process.returncode == 3


def test_a_script_without_a_rank_runs_itself(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("import sys; sys.exit('torch' in sys.modules)")
    environment = os.environ | {"PYTHONPATH": forked_ranks.python_path()}
    environment.pop("RANK", None)
    command = [sys.executable, str(tmp_path / "code.py")]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it_and_it_outlives_nobody(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "stays")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    fork = int(process.stdout.readline())
    process.send_signal(number)
    said = process.stdout.read()
    status = process.wait(60)
    told = ("told to end\n", 9) if number == signal.SIGTERM else ("", -signal.SIGKILL)
    assert (said, status) == told
    for _ in range(500):
        if not Path(f"/proc/{fork}").exists():
            break
        time.sleep(0.01)
    assert not Path(f"/proc/{fork}").exists()


def test_deepspeeds_launcher_is_forked_without_a_path_and_its_rank_is_not(tmp_path: Path) -> None:
    """Whatever it starts is started by the interpreter that it was started by."""
    python = forked_ranks.interpreter()
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    (tmp_path / "rank.py").write_text(
        "import os, sys; parent = open(f'/proc/{os.getppid()}/cmdline').read()\n"
        "print(sys.executable, 'torch' in sys.modules, 'forkserver' in parent)"
    )
    call = [python, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", "--no_ssh_check"]
    call += ["--master_addr", "127.0.0.1", "--no_local_rank", "rank.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"{python} False True" in done.stdout.splitlines(), done.stdout
