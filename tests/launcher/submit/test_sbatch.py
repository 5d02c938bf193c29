"""A Slurm batch script holds the user's words as data, and refuses what sbatch would read as
something else.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grads_ds.config.errors import UserError
from grads_ds.launcher.submit.sbatch import render, submit


def test_words_of_the_command_stay_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = 'x=a\'b "c" $HOME;touch no'
    script = render(
        ["run", "config.yaml", "--set", odd], ["nodes=2", "comment=two words"], tmp_path / "run", 90
    )
    head = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in head and '#SBATCH --comment="two words"' in head
    shown = script.replace(f"{shlex.quote(sys.executable)} -m", "printf '%s\\n'")
    told = subprocess.run(
        ["bash", "-c", shown], capture_output=True, text=True, timeout=20
    ).stdout.splitlines()
    assert told[-3:] == [odd, "--backend", "slurm"] and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "option", ["nodes", "nodes=2\n#SBATCH --uid=0", "Nodes=2", "output=x", "$(id)=1", ""]
)
def test_options_that_are_not_sbatchs_or_not_the_users(option: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--slurm"):
        render(["run", "c"], [option], tmp_path, 90)


def test_submitting_prints_the_job_and_keeps_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """sbatch is a stand-in here; the real one runs in tests/launcher/test_slurm_runs.py."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho '41;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert submit("#!/bin/bash\n", tmp_path / "run", wait=False) == 0
    assert "job 41" in capfd.readouterr().out
    assert [file.read_text() for file in (tmp_path / "run/logs").iterdir()] == ["#!/bin/bash\n"]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="wanted sbatch"):
        submit("", tmp_path / "run", wait=False)


STATUS_BY_SIGNAL = {
    "USR1": (143, True),  # Slurm's warning before the limit: queued again
    "TERM": (143, False),  # scancel, or a preemption that Slurm queues again itself
    None: (5, False),
}


@pytest.mark.parametrize("name", STATUS_BY_SIGNAL)
def test_a_warned_job_queues_itself_again_and_a_cancelled_one_does_not(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rendered script runs, with stand-ins for the launcher and scontrol."""
    status, queued = STATUS_BY_SIGNAL[name]
    monkeypatch.chdir(tmp_path)
    script = render(["run", "c"], ["nodes=1"], tmp_path / "run", grace=100)
    assert "#SBATCH --signal=B:USR1@130" in script and "#SBATCH --requeue" in script
    leave = "true" if name else "exit 5"
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; exit 143' USR1 TERM\nsleep 0.2\ntouch {tmp_path}/up\n"
        f"{leave}\n"
        "while true; do sleep 0.1; done\n"
    )
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/queued\n")
    for program in (launcher, tmp_path / "scontrol"):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    text = script.replace(f"{shlex.quote(sys.executable)} -m grads_ds", str(launcher))
    shell = subprocess.Popen(["bash", "-c", text])
    while name and not (tmp_path / "up").exists():
        time.sleep(0.05)
    if name:
        shell.send_signal(getattr(signal, f"SIG{name}"))
    assert shell.wait(timeout=20) == status
    asked = tmp_path / "queued"
    assert asked.read_text() == "requeue 41\n" if queued else not asked.exists()
