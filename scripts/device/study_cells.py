"""Step `study_cells`: cells of the study at 135M in whatever time is left.

Runs scripts/study/run.py configs/study/real_small.yaml with the kit's model; it resumes from cell
to cell, so that a stopped run keeps what is finished. Skipped, with the reason, where the study or
the model is not there.
"""

from __future__ import annotations

import subprocess
import sys

from step import MODEL, REPO, Step, start

STUDY = REPO / "scripts/study/run.py"
CONFIG = REPO / "configs/study/real_small.yaml"
MADE = REPO / "runs/real_model" / MODEL  # where real_model.py puts it and the study looks
LEAST = 60  # seconds that a first cell needs


def reason_to_skip(step: Step) -> str | None:
    """Why no cell can run here, if so."""
    if step.cpu:
        return "a dry run: one cell takes half an hour on a CPU"
    if missing := [str(path.relative_to(REPO)) for path in (STUDY, CONFIG) if not path.is_file()]:
        return f"this checkout has no {' and no '.join(missing)}"
    if step.model is None and not MADE.is_dir():
        return f"there is no kit with a model, and none at {MADE.relative_to(REPO)}"
    if step.left() < LEAST:
        return f"{step.left():.0f} s are left, a cell takes {LEAST} s or more"
    return None


def run(step: Step) -> bool:
    """The study until it ends or the time is up: both are fine."""
    if reason := reason_to_skip(step):
        step.record(skipped=reason)
        return True
    if not MADE.exists():
        MADE.parent.mkdir(parents=True, exist_ok=True)
        MADE.symlink_to(step.model, target_is_directory=True)
    log = step.out.with_suffix(".log")
    status: int | str
    with log.open("w") as output:
        try:
            status = subprocess.run(
                [sys.executable, str(STUDY), str(CONFIG)],
                stdout=output,
                stderr=output,
                timeout=step.left() - 10,
            ).returncode
        except subprocess.TimeoutExpired:
            status = "stopped at its time limit"
    step.record(ended=status, last_lines=log.read_text().splitlines()[-30:])
    return status in (0, "stopped at its time limit")


if __name__ == "__main__":
    start(run)
