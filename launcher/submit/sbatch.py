"""A whole run as one Slurm batch job: `grads-ds run CONFIG --backend slurm` outside an allocation
renders and submits it.

Writes `logs/slurm-<time>.sh` and hands it to sbatch. Inside the allocation the same command finds
its hosts in Slurm's environment and starts every stage with srun.
"""

from __future__ import annotations

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

_KEY = re.compile(r"[a-z][a-z-]*")
_VALUE = re.compile(r"[^\x00-\x1f\x7f]*")
# this launcher's part: where output goes, and a word of warning before the time is over
_OURS = ("output", "error", "signal", "wait", "wrap")


def render(arguments: Sequence[str], options: Sequence[str], run_dir: Path) -> str:
    """The batch script that runs `grads-ds ARGUMENTS` with sbatch `options` (KEY=VALUE, e.g.

    nodes=8). Raises UserError.
    """
    lines, faults = [], []
    for option in options:
        key, equals, value = option.partition("=")
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            faults.append(
                f"--slurm {option!r}: wanted KEY or KEY=VALUE as sbatch knows them, e.g. nodes=8;"
                " without control characters"
            )
        elif key in _OURS:
            faults.append(f"--slurm {option}: {key} is set by grads-ds; leave it out")
        else:
            lines.append(f"#SBATCH --{key}{equals}{_quoted(value)}")
    if not any(option.startswith("nodes=") for option in options):
        faults.append(
            "--slurm: wanted nodes=N outside an allocation; found none; add --slurm nodes=2"
        )
    if faults:
        raise UserError(faults)
    # sbatch reads no shell quoting here, and %j in a path is its own; a folder may hold neither
    # quote nor per cent sign
    output = str((run_dir / "logs").resolve() / "slurm-%j.log")
    if '"' in output or "%" in output.removesuffix("slurm-%j.log"):
        raise UserError(
            f"run_dir: wanted a path without quotes and per cent signs for Slurm; found {run_dir}"
        )
    return "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --job-name=grads-ds",
            f'#SBATCH --output="{output}"',
            # the launcher passes it on, and every rank is stopped in order
            "#SBATCH --signal=B:TERM@120",
            *lines,
            f"cd -- {shlex.quote(os.getcwd())} || exit 2",
            f"exec {shlex.join([sys.executable, '-m', 'grads_ds', *arguments])}",
            "",
        ]
    )


def submit(script: str, run_dir: Path, wait: bool) -> int:
    """Give the script to sbatch.

    Returns 0 once it is queued; with `wait`, the job's own status when it is over.
    """
    path = run_dir / "logs" / f"slurm-{time.strftime('%Y-%m-%dT%H.%M.%S')}.sh"
    publish_text(path, script)
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
    job = done.stdout.strip().split(";")[0]
    if job:
        print(f"slurm: job {job}, script {path}, output {run_dir}/logs/slurm-{job}.log", flush=True)
    return done.returncode


def _quoted(value: str) -> str:
    return (
        '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if re.search(r"[\s\"'\\]", value)
        else value
    )
