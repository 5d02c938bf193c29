"""`--detach`: the same command in a session of its own, which no terminal ends.

Writes what it says to `logs/detached.log` of the run directory. `grads-ds status` and
`grads-ds stop` reach it through the run directory, as they reach any run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from grads_ds.config.errors import printable
from grads_ds.launcher.job_outcome import DONE, FAILED
from grads_ds.run_dir.lock import lock_holder
from grads_ds.run_dir.publish import make_folder

LOG = "logs/detached.log"
START_SECONDS = 120.0  # from its start until it holds the run directory


def start_detached(command: Sequence[str], run_dir: Path) -> int:
    """Start `command` and stay until it holds the run directory: 0 then.

    When it ends before, what it said is shown and its own status returned; 1 when it is still not
    at work after START_SECONDS, which leaves it alone.
    """
    path = run_dir / LOG
    make_folder(path.parent)
    with open(path, "ab") as log:
        began = log.tell()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            with open(path, "rb") as log:
                log.seek(began)
                print(printable(log.read().decode(errors="replace")), end="", file=sys.stderr)
            # a signal's number is negative here, and above 128 in a shell
            return status if status >= 0 else 128 - status
        holder = lock_holder(run_dir)
        if holder and holder.get("pid") == process.pid:
            _say(f"at work as process {process.pid} on {holder['host']}; log: {path}")
            _say(f"to end it: grads-ds stop {shlex.quote(str(run_dir))}")
            return DONE
        time.sleep(0.1)
    _say(f"process {process.pid} is not at work after {START_SECONDS:g} s; log: {path}")
    return FAILED


def _say(sentence: str) -> None:
    print(printable(f"grads-ds: {sentence}"), file=sys.stderr, flush=True)
