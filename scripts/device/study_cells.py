"""Step `study_cells`: cells of the study at 135M in whatever time is left.

Runs scripts/study/real.py with the kit's model and the data of shared/material: first what methods
choose (purity, needle: nothing is trained), then the training cells of real.yaml. Each resumes from
cell to cell, so that a stopped run keeps what is finished; the results lie beside this step's own.
Skipped, with the reason, where the study, the data or the model is not there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from step import MODEL, REPO, Step, start

STUDY = REPO / "scripts/study/real.py"
RUNS = (("purity", "probe"), ("needle", "probe"), ("real", "evaluate"))  # study, last stage
DATA = ("shared/material/data", "../shared/material/data")
MADE = REPO / "runs/real_model" / MODEL  # where real_model.py puts it
LEAST = 60  # seconds that a first cell needs


def data() -> Path | None:
    """The folder of the study's rows, beside or in the checkout."""
    return next((REPO / place for place in DATA if (REPO / place).is_dir()), None)


def reason_to_skip(step: Step) -> str | None:
    """Why no cell can run here, if so."""
    if step.cpu:
        return "a dry run: one cell takes half an hour on a CPU"
    files = [STUDY, *(REPO / f"configs/study/{name}.yaml" for name, _ in RUNS)]
    if missing := [str(path.relative_to(REPO)) for path in files if not path.is_file()]:
        return f"this checkout has no {' and no '.join(missing)}"
    if data() is None:
        return f"there is no data at {' or '.join(DATA)}"
    if step.model is None and not MADE.is_dir():
        return f"there is no kit with a model, and none at {MADE.relative_to(REPO)}"
    if step.left() < LEAST:
        return f"{step.left():.0f} s are left, a cell takes {LEAST} s or more"
    return None


def material(folder: Path, model: Path, rows: Path) -> Path:
    """A folder as the study wants it: models/<name> and data/, both links."""
    for link, target in ((folder / "models" / MODEL, model), (folder / "data", rows)):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve(), target_is_directory=True)
    return folder


def run(step: Step) -> bool:
    """The studies until they end or the time is up: both are fine."""
    if reason := reason_to_skip(step):
        step.record(skipped=reason)
        return True
    rows, model = data(), step.model or MADE
    assert rows is not None
    place = material(REPO / "runs/study_material", model, rows)
    log = step.out.with_suffix(".log")
    ended: dict[str, int | str] = {}
    for name, last in RUNS:
        if step.left() < LEAST:
            ended[name] = "not begun: no time was left"
            continue
        command = [sys.executable, str(STUDY), str(REPO / f"configs/study/{name}.yaml")]
        with log.open("a") as output:
            try:
                ended[name] = subprocess.run(
                    [*command, "--material", str(place), "--to", last],
                    cwd=REPO,
                    stdout=output,
                    stderr=output,
                    timeout=step.left() - 10,
                ).returncode
            except subprocess.TimeoutExpired:
                ended[name] = "stopped at its time limit"
        found = REPO / f"docs/results/study_{name}.json"
        if found.is_file():
            shutil.copy(found, step.out.with_name(found.name))
    step.record(ended=ended, last_lines=log.read_text().splitlines()[-30:])
    return not any(isinstance(status, int) and status for status in ended.values())


if __name__ == "__main__":
    start(run)
