"""The study: does a subset chosen by gradients teach more and make forget less than a random one,
and where?

    python scripts/study/run.py configs/study/small.yaml --material FOLDER [--jobs 2] [--collect]

Reads a study's YAML and the models and data it names below FOLDER. For every domain, share of
planted noise, seed and footing (equal epochs or equal steps) it runs the pipeline (`grads-ds run`)
on a pool of its own, every method and budget a variant of the one run; the footings of a pool share
its probe and the model trained on all of it. Writes the runs below `out` and the numbers of all of
them to `results` (JSON), from which scripts/study/tables.py makes the tables. Resumable: what is
finished is skipped. --collect only gathers what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.study import orders, pools
from scripts.study.collect import collect
from scripts.study.design import REPO, Cell, Study, cells, footings, read
from scripts.study.run_configs import run_config

Work = TypeVar("Work")


def run_cell(
    study: Study, material: Path, cell: Cell, ranks: int, threads: int, last: str = "evaluate"
) -> None:
    """Make the cell's pool and run it on every footing, up to the stage `last`.

    The probe and the model of the whole pool are made once and shared.
    """
    orders.register(Path(study.out))
    folder = Path(study.out).resolve() / cell.folder
    if not (folder / "anchor.jsonl").is_file():
        make_pool(study, material, cell, folder)
    wanted_orders = {given.get("plugin_options", {}).get("order") for given in _methods(study)}
    if wanted_orders - {None} and not (folder / orders.FILE).is_file():
        orders.write_orders(folder, cell.seed, "bm25" in wanted_orders)
    first, *rest = wanted = footings(study, cell)
    for equal in wanted:
        config = folder / f"{equal}.yaml"
        config.write_text(
            yaml.safe_dump(run_config(study, material, cell, folder, equal), sort_keys=False)
        )
        run = folder / equal
        if equal in rest and not run.is_dir():
            shutil.copytree(
                folder / first,
                aside := folder / f"{equal}.part",
                ignore=_of_subsets,
                dirs_exist_ok=True,
            )
            aside.rename(run)
        if not (run / "evaluation.json").is_file():
            grads_ds(config, ranks, threads, last)
        if last != "evaluate":
            return
    # the numbers are kept, gigabytes of models are not
    for weights in folder.rglob("*.safetensors"):
        if "sft" in weights.parts:
            weights.write_bytes(b"")


def make_pool(study: Study, material: Path, cell: Cell, folder: Path) -> None:
    """Write the cell's files, see scripts/study/pools.py."""
    domain = study.domains[cell.domain]
    pools.write_cell(
        folder,
        pools.read_rows([material / file for file in domain.files], domain.skip_every),
        pools.read_rows([material / study.off_domain]),
        pools.read_rows([material / study.general]),
        pool=study.pool,
        held_out=study.held_out,
        anchor=study.anchor,
        anchor_from=study.anchor_from,
        noise=cell.noise,
        seed=cell.seed,
        needle=_needle(study, material, cell),
        choices=study.choices,
        like_topic=study.like_topic,
        tasks={name: pools.read_rows([material / file]) for name, file in study.tasks.items()},
    )


def _needle(
    study: Study, material: Path, cell: Cell
) -> tuple[float, dict[str, list[pools.Row]]] | None:
    """The share of the domain's rows in a needle pool, and the rows of the other sources by name;
    None where noise is planted.
    """
    if study.needle is None:
        return None
    domains = {name: domain.files for name, domain in study.domains.items() if name != cell.domain}
    sources = {"off_domain": [study.off_domain], **domains, **study.other_sources}
    rows = {
        name: pools.read_rows([material / file for file in files])
        for name, files in sources.items()
    }
    return study.needle, rows


def _methods(study: Study) -> list[dict[str, Any]]:
    return [*study.methods.values(), *study.chosen.values()]


def _of_subsets(folder: str, names: list[str]) -> set[str]:
    """What a second footing does not share with the first: models of subsets, and what was
    evaluated.
    """
    kept = {"variants": {"full"}, "sft": {"variants"}}.get(Path(folder).name)
    if kept is None or "selection" in Path(folder).parts:
        return {name for name in names if name.startswith(("evaluat", "tensorboard"))}
    return set(names) - kept


def grads_ds(config: Path, ranks: int, threads: int, last: str = "evaluate") -> None:
    """Run the pipeline up to a stage in a process of its own; what it prints goes to a log beside
    the config.

    Raises SystemExit when it fails.
    """
    log = config.with_suffix(".log")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as output:
        command = [
            sys.executable,
            "-m",
            "grads_ds",
            "run",
            str(config),
            "--ranks",
            str(ranks),
            "--to",
            last,
        ]
        if subprocess.run(
            command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT
        ).returncode:
            raise SystemExit(f"study: {config} failed; its last words are in {log}")


def threads_each(jobs: int) -> int:
    """Cores for each of `jobs` that run at a time."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def side_by_side(jobs: int, run: Callable[[Work], None], work: Sequence[Work]) -> Iterator[Work]:
    """Run all of `work`, `jobs` at a time; yields each when it is done.

    The first failure cancels what has not begun and is raised.
    """
    with ThreadPoolExecutor(jobs) as workers:
        running = {workers.submit(run, piece): piece for piece in work}
        try:
            for done in as_completed(running):
                done.result()
                yield running[done]
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


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
        "--jobs", type=int, default=1, help="cells at a time; they share the machine's cores"
    )
    parser.add_argument(
        "--collect", action="store_true", help="run nothing; gather what is finished"
    )
    options = parser.parse_args()
    study = read(options.study)
    material = options.material.resolve()
    work = [] if options.collect else list(cells(study))
    threads = threads_each(options.jobs * options.ranks)
    began = time.monotonic()
    done = side_by_side(
        options.jobs, lambda cell: run_cell(study, material, cell, options.ranks, threads), work
    )
    for number, cell in enumerate(done, 1):
        print(
            f"study: {number} of {len(work)}: {cell.folder} after {time.monotonic() - began:.0f} s",
            flush=True,
        )
        _publish(study, material)
    _publish(study, material)


def _publish(study: Study, material: Path) -> None:
    results = Path(study.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(collect(study, material), indent=1) + "\n")


if __name__ == "__main__":
    main()
