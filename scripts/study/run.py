"""The study: does a subset chosen by gradients teach more and make forget less than a random one,
and where?

    python scripts/study/run.py configs/study/small.yaml --material FOLDER [--jobs 2] [--collect]

Reads a study's YAML and the models and data it names below FOLDER. For every domain, share of
planted noise, seed and footing (equal epochs or equal steps) it runs the pipeline (`grads-ds run`)
on a pool of its own, every method and budget a variant of the one run; the footings of a pool share
its probe and the model trained on all of it. Writes the runs below `out` and the numbers of all of
them to `results` (JSON), from which scripts/study/tables.py makes the tables. Resumable: what is
finished is skipped. What fails is told at the end, with exit status 1; the other runs go on.
--collect only gathers what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.study.collect import collect
from scripts.study.design import Study, cells, read
from scripts.study.footings import Place, run_cells, tell_failures, threads_each


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--material",
        type=Path,
        required=True,
        help="folder that holds the models and data the study names",
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; they share the machine's cores"
    )
    parser.add_argument(
        "--collect", action="store_true", help="run nothing; gather what is finished"
    )
    options = parser.parse_args()
    study = read(options.study)
    material = options.material.resolve()
    threads = threads_each(options.jobs * options.ranks)
    place = Place(material, options.jobs, options.ranks, threads)
    wanted = [] if options.collect else list(cells(study))
    failed = run_cells(study, wanted, place, lambda: _publish(study, material))
    _publish(study, material)
    tell_failures(failed)


def _publish(study: Study, material: Path) -> None:
    results = Path(study.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(collect(study, material), indent=1) + "\n")


if __name__ == "__main__":
    main()
