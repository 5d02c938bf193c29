"""Whose a folder is: a run directory carries a marker, and no other folder is ever written into."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from grads_ds.config.errors import UserError, problem
from grads_ds.run_dir.publish import publish_json

MARKER = "grads_ds_run.json"
ELSEWHERE = "name a folder of its own, for instance runs/medicine"


def run_dir_problems(run_dir: str) -> list[str]:
    """Why `run_dir`, as the config has it, cannot be a run directory. Writes nothing."""
    given = str(run_dir)
    if not given.strip():
        return [problem("run_dir", "the name of a folder", "an empty one", ELSEWHERE)]
    if given.startswith("~") or re.search(r"\$\{?[A-Za-z_]", given):
        found = f"{given}, which no shell has expanded"
        return [
            problem("run_dir", "a path as it stands", found, "write it out, ./~ for a real one")
        ]
    path = Path(given).resolve()
    if path in (Path.home().resolve(), Path(path.anchor)):
        return [problem("run_dir", "a folder for this run alone", str(path), ELSEWHERE)]
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir():
        return [problem("run_dir", "a folder", f"the file {above}", ELSEWHERE)]
    if above != path and not os.access(above, os.W_OK | os.X_OK):
        found = f"{above}, where this user may not write"
        return [problem("run_dir", "a folder that can be made", found, ELSEWHERE)]
    if path.is_dir() and not (path / MARKER).is_file():
        others = sorted(f.name for f in path.iterdir() if not f.name.startswith(f".{MARKER}."))
        if others:
            shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" * (len(others) > 5))
            wanted = f"a new or empty folder, or a run's (with {MARKER})"
            return [problem("run_dir", wanted, f"{path} with {shown}", ELSEWHERE)]
    return []


def claim(run_dir: Path) -> None:
    """Make `run_dir` a run directory, unless it is one.

    Raises UserError for a folder of somebody's own, OSError where it cannot be written.
    """
    problems = run_dir_problems(str(run_dir))
    if problems:
        raise UserError(problems)
    if not (run_dir / MARKER).is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        publish_json(run_dir / MARKER, {"run directory of": "grads_ds", "made": made})
