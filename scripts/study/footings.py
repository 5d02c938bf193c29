"""The runs of a study's cells, one for each footing, several at a time.

A cell's first footing makes its pool, its scores and the base model's own answers. The others start
after it, from copies of these; of the whole pool's model too, where both train it alike. Of a
finished run the numbers are kept and the weights, gigabytes of them, are not.
"""

from __future__ import annotations

import heapq
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scripts.study import orders, pools
from scripts.study.design import REPO, Cell, Study, footings
from scripts.study.run_configs import run_config

Work = TypeVar("Work")
EVALUATE = "evaluate"


@dataclass(frozen=True)
class Place:
    """Where a study runs: `jobs` runs at a time, each of `ranks` processes with `threads`; and up
    to which stage: before `evaluate` the first footing of a cell says it all.
    """

    material: Path
    jobs: int = 1
    ranks: int = 1
    threads: int = 1
    last: str = EVALUATE


def run_cells(
    study: Study, wanted: Iterable[Cell], place: Place, ended: Callable[[], None]
) -> list[str]:
    """Run every footing of the cells, and `ended` after each; what failed, a sentence each. A
    failure stops the footings that would have begun with its copy, and nothing else.
    """
    orders.register(Path(study.out))
    groups = [[(cell, equal) for equal in footings(study, cell)] for cell in wanted]
    if place.last != EVALUATE:
        groups = [group[:1] for group in groups]
    total, failed, began = sum(map(len, groups)), list[str](), time.monotonic()
    runs = side_by_side(place.jobs, lambda run: run_footing(study, place, *run), groups)
    for number, ((cell, equal), error) in enumerate(runs, 1):
        took = f"after {time.monotonic() - began:.0f} s"
        print(
            f"study: {number} of {total}: {cell.folder}/{equal}"
            f" {'ended' if error is None else 'FAILED'} {took}",
            flush=True,
        )
        if error is not None:
            waiting = next((len(g) - 1 for g in groups if g[0] == (cell, equal)), 0)
            more = f"; {waiting} footings that wait for it were not run" if waiting else ""
            failed.append(f"{cell.folder}/{equal}: {error}{more}")
        ended()
    return failed


def tell_failures(failed: Sequence[str]) -> None:
    """Raise SystemExit, status 1, with all that failed; nothing where nothing did."""
    if failed:
        raise SystemExit("\n".join([f"study: {len(failed)} failed:", *failed]))


def side_by_side(
    jobs: int, run: Callable[[Work], None], groups: Sequence[Sequence[Work]]
) -> Iterator[tuple[Work, BaseException | None]]:
    """Run all pieces of all groups, `jobs` at a time, earlier groups before later ones; a group's
    first piece before its others, which are left out where it fails. Yields each piece that has
    ended, with what it failed of.
    """
    ready = [(number, 0) for number, group in enumerate(groups) if group]
    running: dict[Future[None], tuple[int, int]] = {}
    with ThreadPoolExecutor(jobs) as workers:
        while ready or running:
            while ready and len(running) < jobs:
                number, place = heapq.heappop(ready)
                running[workers.submit(run, groups[number][place])] = (number, place)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                number, place = running.pop(done)
                error = done.exception()
                if place == 0 and error is None:
                    for other in range(1, len(groups[number])):
                        heapq.heappush(ready, (number, other))
                yield groups[number][place], error


def run_footing(study: Study, place: Place, cell: Cell, equal: str) -> None:
    """One run of a cell; the first footing's makes the pool, and the others' beginnings."""
    folder = Path(study.out).resolve() / cell.folder
    first, *rest = footings(study, cell)
    if equal == first:
        _make_inputs(study, place.material, cell, folder)
    config, run = folder / f"{equal}.yaml", folder / equal
    given = run_config(study, place.material, cell, folder, equal)
    config.write_text(yaml.safe_dump(given, sort_keys=False))
    if not is_finished(run, given):
        grads_ds(config, place.ranks, place.threads, place.last)
    if place.last != EVALUATE:
        return
    for other in rest if equal == first else ():
        if not (folder / other).is_dir():
            aside = folder / f"{other}.part"
            left_out = _left_out(_train_alike(study, first, other))
            shutil.copytree(run, aside, ignore=left_out, dirs_exist_ok=True)
            aside.rename(folder / other)
    for part in ("sft", "best"):
        for weights in (run / part).rglob("*.safetensors"):
            weights.write_bytes(b"")


def is_finished(run: Path, config: dict[str, Any]) -> bool:
    """Whether a run has been evaluated, and has looked for the best model where it has to."""
    limited = config["evaluate"].get("max_forgetting") is not None
    files = ["evaluation.json", *(["best/choice.json"] if limited else [])]
    return all((run / file).is_file() for file in files)


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


def _make_inputs(study: Study, material: Path, cell: Cell, folder: Path) -> None:
    if not (folder / "anchor.jsonl").is_file():
        make_pool(study, material, cell, folder)
    methods = [*study.methods.values(), *study.chosen.values()]
    wanted_orders = {given.get("plugin_options", {}).get("order") for given in methods}
    if wanted_orders - {None} and not (folder / orders.FILE).is_file():
        orders.write_orders(folder, cell.seed, "bm25" in wanted_orders)


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


def _train_alike(study: Study, one: str, other: str) -> bool:
    """Whether two footings make the same model of the whole pool, which takes the same steps
    whatever is equal. Where they do not, the run would find a copy stale and train anew.
    """
    first, second = (
        {key: value for key, value in study.footings[name].sft.items() if key != "frontier"}
        for name in (one, other)
    )
    return first == second


def _left_out(with_full: bool) -> Callable[[str, list[str]], set[str]]:
    """What of the first footing's run another does not begin with: models of subsets, what was
    evaluated but the base model's own answers, logs; for shutil.copytree.
    """
    kept: dict[str, Callable[[str], bool]] = {
        "sft": lambda name: with_full and name == "variants",
        "sft/variants": lambda name: name == "full",
        "evaluation": lambda name: name == "own_answers",
        "evaluation/own_answers": lambda name: name.startswith("answers."),
    }
    unwanted = {"best", "evaluation.json", "report.html", "logs", "tensorboard"}

    def of(folder: str, names: list[str]) -> set[str]:
        place = Path(folder)
        for within, wanted in kept.items():
            if place.parts[-within.count("/") - 1 :] == Path(within).parts:
                return {name for name in names if not wanted(name)}
        return unwanted.intersection(names)

    return of


def grads_ds(config: Path, ranks: int, threads: int, last: str = EVALUATE) -> None:
    """Run the pipeline up to a stage in a process of its own; what it prints goes to a log beside
    the config.

    Raises SystemExit when it fails.
    """
    log = config.with_suffix(".log")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "grads_ds", "run", str(config)]
    command += ["--ranks", str(ranks), "--to", last]
    with open(log, "a") as output:
        if subprocess.run(
            command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT
        ).returncode:
            raise SystemExit(f"{config} failed; its last words are in {log}")


def threads_each(jobs: int) -> int:
    """Cores for each of `jobs` that run at a time."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)
