"""A whole run as one Slurm batch job: `grads-ds run CONFIG --backend slurm` outside an allocation
renders and submits it.

Writes `logs/slurm-<time>.sh` and hands it to sbatch. Inside the allocation the same command finds
its hosts in Slurm's environment and starts every stage with srun.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from grads_ds.config.errors import UserError
from grads_ds.run_dir.publish import publish_text

NAME, WAITS = "slurm", True
HELP = "sbatch option for --backend slurm outside an allocation, e.g. nodes=8, partition=gpu"
MISPLACED = (
    "--slurm, --wait: wanted --backend slurm outside an allocation; found another place; leave them"
    " out"
)
_KEY = re.compile(r"[a-z][a-z-]*")
_VALUE = re.compile(r"[^\x00-\x1f\x7f]*")
# this launcher's part: where output goes, the warning before the time is over, and the start after
_OURS = ("output", "error", "signal", "requeue", "no-requeue", "open-mode", "wait", "wrap")
_MARGIN = 30.0  # seconds between the ranks' last grace and Slurm's limit


# the shell stays: only it can tell Slurm's warning from scancel
_FORWARD = (
    "launcher=$! warned=",
    "trap 'warned=yes; kill -USR1 $launcher' USR1",
    "trap 'kill -TERM $launcher' TERM",
    'while kill -0 "$launcher" 2> /dev/null; do wait "$launcher"; done',
    'wait "$launcher"; status=$?',
    'if [ -n "$warned" ] && [ $status = 143 ]; then',
    '    scontrol requeue "$SLURM_JOB_ID"',
    "fi",
    "exit $status",
)


def outside() -> bool:
    """Whether this process is in no Slurm allocation."""
    return "SLURM_JOB_ID" not in os.environ


def render(arguments: Sequence[str], options: Sequence[str], run_dir: Path, grace: float) -> str:
    """The batch script that runs `grads-ds ARGUMENTS` by srun, with sbatch `options` (KEY=VALUE,
    e.g. nodes=8). Raises UserError.

    Slurm warns the launcher by SIGUSR1 before the time is over, early enough for `grace` seconds
    of a last checkpoint; the job then queues itself again and goes on from there. After scancel
    (SIGTERM) it does not.
    """
    lines, problems = [], []
    for option in options:
        key, equals, value = option.partition("=")
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            problems.append(
                f"--slurm {option!r}: wanted KEY or KEY=VALUE as sbatch knows them, e.g. nodes=8;"
                " without control characters"
            )
        elif key in _OURS:
            problems.append(f"--slurm {option}: {key} is set by grads-ds; leave it out")
        else:
            lines.append(f"#SBATCH --{key}{equals}{_quoted(value)}")
    if not any(option.startswith("nodes=") for option in options):
        problems.append(
            "--slurm: wanted nodes=N outside an allocation; found none; add --slurm nodes=2"
        )
    if problems:
        raise UserError(problems)
    # sbatch reads no shell quoting here, and %j in a path is its own; a folder may hold neither
    # quote nor per cent sign
    output = str((run_dir / "logs").resolve() / "slurm-%j.log")
    if '"' in output or "%" in output.removesuffix("slurm-%j.log"):
        raise UserError(
            f"run_dir: wanted a path without quotes and per cent signs for Slurm; found {run_dir}"
        )
    command = [sys.executable, "-m", "grads_ds", *arguments, "--backend", NAME]
    return "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --job-name=grads-ds",
            f'#SBATCH --output="{output}"',
            f"#SBATCH --signal=B:USR1@{math.ceil(grace + _MARGIN)}",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            *lines,
            f"cd -- {shlex.quote(os.getcwd())} || exit 2",
            f"{shlex.join(command)} &",
            *_FORWARD,
            "",
        ]
    )


def submit(job: str, run_dir: Path, wait: bool) -> int:
    """Keep the script under `logs/` and give it to sbatch.

    Returns 0 once it is queued; with `wait`, the job's own status when it is over.
    """
    path = run_dir / "logs" / f"slurm-{time.strftime('%Y-%m-%dT%H.%M.%S')}.sh"
    publish_text(path, job)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *(["--wait"] if wait else []), str(path)],
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise UserError(
            f"--backend slurm: wanted sbatch; {error.strerror}; install slurm-client or log in to a"
            " Slurm host"
        ) from None
    number = done.stdout.strip().split(";")[0]
    if number:
        output = f"{run_dir}/logs/slurm-{number}.log"
        print(f"slurm: job {number}, script {path}, output {output}", flush=True)
    return done.returncode


def _quoted(value: str) -> str:
    return (
        '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if re.search(r"[\s\"'\\]", value)
        else value
    )
