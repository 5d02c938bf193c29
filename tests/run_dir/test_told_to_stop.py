"""Whoever holds a run directory and is told to stop leaves in order: by a signal, or by
`grads-ds stop` through the run directory's files alone.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grads_ds.cli import main
from grads_ds.launcher.job_outcome import STOPPED
from grads_ds.run_dir.ownership import MARKER
from grads_ds.run_dir.publish import publish_json

HANGUP = 129
TOLD = {
    signal.SIGTERM: STOPPED,
    signal.SIGUSR1: STOPPED,
    signal.SIGHUP: HANGUP,
    "grads-ds stop": STOPPED,
}


@pytest.mark.parametrize("how", TOLD)
def test_a_holder_that_is_asked_to_stop_leaves_in_order(
    how: signal.Signals | str,
    hold: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish_json(tmp_path / MARKER, {})
    process = hold()
    if isinstance(how, signal.Signals):
        process.send_signal(how)
    else:
        assert main(["stop", str(tmp_path)]) == 0
        assert "grads-ds: stopped" in capsys.readouterr().err
    said = process.communicate(timeout=30)[1]
    assert process.returncode == TOLD[how] and "Traceback" not in said
    assert not list(tmp_path.glob("*lock*")) and not list(tmp_path.glob(".stop*"))


def test_stop_names_a_holder_that_stays_and_finds_nobody(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_json(tmp_path / MARKER, {})
    assert main(["stop", str(tmp_path)]) == 0 and "nobody" in capsys.readouterr().err
    process = hold()
    process.send_signal(signal.SIGSTOP)
    assert main(["stop", str(tmp_path), "--wait-seconds", "1"]) == 1
    assert "still at work" in capsys.readouterr().err


def test_a_holder_under_nohup_does_not_heed_the_terminals_end(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = hold("nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and (tmp_path / "lock.json").exists()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == STOPPED
