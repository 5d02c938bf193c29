"""Whose a folder is: a run directory carries a marker, and no other folder is ever written into."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from grads_ds.config.errors import WRONG_PATH, UserError, problem
from grads_ds.run_dir.publish import publish_json
from grads_ds.run_dir.units import read_owned

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
    try:
        path = Path(given).resolve()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        found = f"{given[:80]}: {getattr(error, 'strerror', None) or error}"
        return [problem("run_dir", "a folder that can be made", found, ELSEWHERE)]
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


def require_run(run_dir: Path) -> None:
    """Raise UserError unless `run_dir` has the marker: other folders are not even looked at."""
    if not (run_dir / MARKER).is_file():
        found = "none" if run_dir.is_dir() else "nothing there"
        raise UserError(problem(str(run_dir), f"a run ({MARKER})", found, "give a run_dir"))


def owned_by(path: Path) -> Path | None:
    """The file or folder of some run that `path` is, or lies in, and that the run may replace."""
    path = path.absolute()
    for run_dir in path.parents:
        if (run_dir / MARKER).is_file():
            for file in (run_dir / "state").glob("*.owned"):
                for name in read_owned(file):
                    if path.is_relative_to(run_dir / name):
                        return run_dir / name
    return None


def new_folder_problems(key: str, path: Path) -> list[str]:
    """Why a command cannot make the folder `path`, its option `key`; one above it may be made."""
    if path.exists() or path.is_symlink():
        return [problem(key, "a new folder", f"{path}", "give another or remove it")]
    if owner := owned_by(path):
        found = f"{path} in {owner}, which the run replaces"
        return [problem(key, "a folder of its own", found, "give another")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (*WRONG_PATH, FileExistsError) as error:
        found = f"{path}: {error.strerror}"
        return [problem(key, "a folder that can be made", found, "give another")]
    return []


def claim(run_dir: Path) -> None:
    """Make `run_dir` a run directory, unless it is one.

    Raises UserError for a folder of somebody's own, OSError where it cannot be written.
    """
    problems = run_dir_problems(str(run_dir))
    if problems:
        raise UserError(problems)
    if not (run_dir / MARKER).is_file():
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, PermissionError, FileExistsError) as error:
            found = f"{run_dir}: {error.strerror}"
            raise UserError(problem("run_dir", "a folder to write in", found, ELSEWHERE)) from None
        made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        publish_json(run_dir / MARKER, {"run directory of": "grads_ds", "made": made})
