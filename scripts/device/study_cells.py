"""Step `study_cells`: cells of the study at 135M in whatever time is left.

Runs each of STUDIES by its script, with the kit's model and the data of shared/material, several
runs at a time. A stopped study keeps the runs that are finished. What they found is packed, a file
for each study of which there are runs (study_cells.NAME.runs.tar.xz, without weights): unpacked in
a checkout, the script's `--collect` makes the tables of it. Skipped, with the reason, where a
study, the data or the model is not there.
"""

from __future__ import annotations

import lzma
import os
import sys
import tarfile
from pathlib import Path

from step import MODEL, REPO, Step, run_within, start

# a study's file below configs/study -> its script below scripts/study
STUDIES = {"real": "real.py", "needle": "real.py", "forgetting": "levers.py"}
# folders that no table is made of
HEAVY = {"checkpoints", "tensorboard", "model", "snapshots", "adapter"}
KEPT = {".json", ".jsonl", ".parquet", ".arrow", ".yaml", ".log", ".txt"}
LARGE = 3 * 2**19  # bytes above which a file is rows to replay, a tokenizer or weights
DATA = ("shared/material/data", "../shared/material/data")
MADE = REPO / "runs/real_model" / MODEL  # where real_model.py puts it
PACKING = 20  # seconds kept for it
LEAST = 60  # seconds that a first run needs
WINDOW = 2**26  # bytes within which repetitions are found: several runs


def data() -> Path | None:
    """The folder of the study's rows, beside or in the checkout."""
    return next((REPO / place for place in DATA if (REPO / place).is_dir()), None)


def reason_to_skip(step: Step) -> str | None:
    """Why no cell can run here, if so."""
    if step.cpu:
        return "a dry run: one cell takes half an hour on a CPU"
    files = [REPO / f"configs/study/{name}.yaml" for name in STUDIES]
    files += [REPO / "scripts/study" / script for script in dict.fromkeys(STUDIES.values())]
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


def runs_at_a_time() -> int:
    """Processes for one GPU: a run is bound by its starts and by kernels' launches."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def packed(out: Path) -> dict[str, int]:
    """Pack the runs of every study without weights, each study's into a file beside `out`; how many
    bytes each file has. The footings of a cell hold much alike, far apart.
    """

    def light(item: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(item.name)
        small = item.isdir() or (path.suffix in KEPT and item.size < LARGE)
        return item if small and not HEAVY.intersection(path.parts) else None

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": WINDOW}]
    sizes = {}
    for folder in sorted(path for path in (REPO / "runs/study").glob("*") if path.is_dir()):
        archive = out.with_suffix(f".{folder.name}.runs.tar.xz")
        with (
            lzma.open(archive, "wb", filters=filters) as stream,
            tarfile.open(fileobj=stream, mode="w|") as tar,
        ):
            tar.add(folder, f"runs/study/{folder.name}", filter=light)
        sizes[folder.name] = archive.stat().st_size
    return sizes


def run(step: Step) -> bool:
    """The studies until they end or the time is up: both are fine."""
    if reason := reason_to_skip(step):
        step.record(skipped=reason)
        return True
    rows, model = data(), step.model or MADE
    assert rows is not None
    place = material(REPO / "runs/study_material", model, rows)
    log = step.out.with_suffix(".cells.log")
    ended: dict[str, int | str] = {}
    for name, script in STUDIES.items():
        if step.left() < LEAST:
            ended[name] = "not begun: no time was left"
            continue
        command = [sys.executable, str(REPO / "scripts/study" / script)]
        command += [str(REPO / f"configs/study/{name}.yaml"), "--material", str(place)]
        command += ["--jobs", str(runs_at_a_time())]
        with log.open("a") as output:
            status = run_within(command, output, step.left() - PACKING, REPO)
        ended[name] = status if isinstance(status, int) else "stopped at its time limit"
    step.record(ended=ended, last_lines=log.read_text().splitlines()[-30:])
    step.record(packed=packed(step.out))
    return not any(isinstance(status, int) and status for status in ended.values())


if __name__ == "__main__":
    start(run)
