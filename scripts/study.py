"""The study: does a subset chosen by gradients teach more and make forget less than a random one, and where?

    python scripts/study.py configs/study/small.yaml --material FOLDER [--jobs 2] [--collect]

Reads a study's YAML and the models and data it names below FOLDER. For every domain, share of planted faults, seed and footing
(equal epochs or equal steps) it runs the pipeline (`grads-ds run`) on a pool of its own, every method and budget a variant of
the one run; the footings of a pool share its probe and the model trained on all of it. Writes the runs below `out` and the
numbers of all of them to `results` (JSON), from which scripts/study_tables.py makes the tables. Resumable: what is finished is
skipped. --collect only gathers what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ConfigDict, Field

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "scripts")]
import study_pools  # noqa: E402


class Domain(BaseModel):
    """One domain: its files below the material folder, and whether defaults are chosen or confirmed on it."""

    model_config = ConfigDict(extra="forbid")
    files: list[str] = Field(min_length=1)
    role: Literal["choose", "confirm"] = "choose"
    skip_every: int | None = None


SETS = ("domain", "swapped", "general")
Equal = Literal["epochs", "steps"]


class Footing(BaseModel):
    """What is trained on one footing: budgets, and the methods and shares of faults if not all of the study's."""

    model_config = ConfigDict(extra="forbid")
    budgets: list[float] = Field(min_length=1)
    methods: list[str] | None = None
    noise: list[float] | None = None


class Study(BaseModel):
    """A study. `methods` are settings of select, `run` any other keys of a run's config."""

    model_config = ConfigDict(extra="forbid")
    out: str
    results: str
    model: str
    domains: dict[str, Domain]
    general: str
    off_domain: str
    anchor: int = 0  # rows of the domain, in neither pool nor held-out sets, whose gradient is a direction to go by
    pool: int = 800
    held_out: int = 150
    noise: list[float] = [0.0, 0.4]
    seeds: list[int] = [0, 1, 2]
    footings: dict[Equal, Footing] = Field(min_length=1)
    methods: dict[str, dict[str, Any]]
    run: dict[str, Any] = {}


@dataclass(frozen=True)
class Cell:
    """One pool: a domain, a share of faults and a seed."""

    domain: str
    noise: float
    seed: int

    @property
    def folder(self) -> str:
        """Where the cell lies below `out`."""
        return f"{self.domain}-noise{self.noise:g}-seed{self.seed}"


def cells(study: Study) -> Iterator[Cell]:
    """All cells that any footing wants, seeds outermost, so that an interrupted study is a whole one with fewer seeds."""
    for seed in study.seeds:
        for noise in study.noise:
            for domain in study.domains:
                cell = Cell(domain, noise, seed)
                if footings(study, cell):
                    yield cell


def variant(method: str, budget: float) -> str:
    """The name of a method's subset at a budget."""
    return f"{method}_{budget * 100:g}"


def footings(study: Study, cell: Cell) -> list[Equal]:
    """The footings this cell is run on."""
    return [equal for equal, footing in study.footings.items() if cell.noise in (footing.noise or study.noise)]


def pairs(study: Study, equal: Equal) -> list[tuple[str, float]]:
    """Every method and budget of a footing."""
    footing = study.footings[equal]
    return [(method, budget) for budget in footing.budgets for method in footing.methods or study.methods]


def run_config(study: Study, material: Path, cell: Cell, folder: Path, equal: Equal) -> dict[str, Any]:
    """The config of one run: the first method at the first budget is the main selection, every other pair a variant."""
    settings = {variant(m, b): {**study.methods[m], "budget": b} for m, b in pairs(study, equal)}
    main, *others = settings
    config: dict[str, Any] = json.loads(json.dumps(study.run))
    if study.anchor:
        probe = config.setdefault("probe", {})
        probe |= {"anchor": str(folder / "anchor.jsonl"), "extras": [*probe.get("extras", []), "anchor"]}
    tasks = {name: str(folder / f"{name}_choice.jsonl") for name in ("domain", "general")}
    config |= {
        "run_dir": str(folder / equal),
        "seed": cell.seed,
        "model": {"path": str(material / study.model), **config.get("model", {})},
        "data": {
            "train": [str(folder / "pool.jsonl")],
            "validation": {name: str(folder / f"{name}.jsonl") for name in SETS},
            "metadata": ["kind"],
            **config.get("data", {}),
        },
        "select": {**settings[main], "variants": {name: _against(settings[main], settings[name]) for name in others}},
        "sft": {**config.get("sft", {}), "variants": ["full", *others], "equal": equal},
        "evaluate": {"multiple_choice": tasks, "chat": True, **config.get("evaluate", {})},
        "deepspeed": str(REPO / config.get("deepspeed", "configs/deepspeed/zero3.json")),
    }
    return config


def _against(main: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A variant's settings, with the main selection's own settings put back to their defaults where it does not name them."""
    from grads_ds.config import SelectConfig

    defaults = SelectConfig().model_dump(mode="json")
    return {**{key: defaults[key] for key in main}, **other}


def run_cell(study: Study, material: Path, cell: Cell, ranks: int, threads: int) -> None:
    """Make the cell's pool and run it on every footing. The probe and the model of the whole pool are made once and shared."""
    folder = Path(study.out).resolve() / cell.folder
    if not (folder / "anchor.jsonl").is_file():
        domain = study.domains[cell.domain]
        study_pools.write_cell(
            folder,
            study_pools.read_rows([material / file for file in domain.files], domain.skip_every),
            study_pools.read_rows([material / study.off_domain]),
            study_pools.read_rows([material / study.general]),
            pool=study.pool,
            held_out=study.held_out,
            anchor=study.anchor,
            noise=cell.noise,
            seed=cell.seed,
        )
    first, *rest = wanted = footings(study, cell)
    for equal in wanted:
        config = folder / f"{equal}.yaml"
        config.write_text(yaml.safe_dump(run_config(study, material, cell, folder, equal), sort_keys=False))
        run = folder / equal
        if equal in rest and not run.is_dir():
            shutil.copytree(folder / first, aside := folder / f"{equal}.part", ignore=_of_subsets, dirs_exist_ok=True)
            aside.rename(run)
        if not (run / "evaluation.json").is_file():
            _grads_ds(config, ranks, threads)
    for weights in folder.rglob("*.safetensors"):  # the numbers are kept, gigabytes of models are not
        if "sft" in weights.parts:
            weights.write_bytes(b"")


def _of_subsets(folder: str, names: list[str]) -> set[str]:
    """What a second footing does not share with the first: models of subsets, and what was evaluated."""
    kept = {"variants": {"full"}, "sft": {"variants"}}.get(Path(folder).name)
    if kept is None or "selection" in Path(folder).parts:
        return {name for name in names if name.startswith(("evaluat", "tensorboard"))}
    return set(names) - kept


def _grads_ds(config: Path, ranks: int, threads: int) -> None:
    log = config.with_suffix(".log")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a") as output:
        command = [sys.executable, "-m", "grads_ds", "run", str(config), "--ranks", str(ranks), "--to", "evaluate"]
        if subprocess.run(command, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"study: {config} failed; its last words are in {log}")


def collect(study: Study, material: Path) -> dict[str, Any]:
    """Every finished run's numbers: losses and accuracies by model, what was kept of each kind, tokens, seconds and FLOPs."""
    parameters = _parameters(material / study.model)
    records = []
    for cell in cells(study):
        for equal in footings(study, cell):
            run = Path(study.out) / cell.folder / equal
            if (run / "evaluation.json").is_file():
                evaluation = json.loads((run / "evaluation.json").read_text())
                main = variant(*pairs(study, equal)[0])
                records.append(
                    asdict(cell)
                    | {"equal": equal, "role": study.domains[cell.domain].role}
                    | _numbers(study, run, evaluation, main, parameters)
                )
    return {"study": study.model_dump(mode="json"), "parameters": parameters, "runs": records}


def _numbers(study: Study, run: Path, evaluation: dict[str, Any], main: str, parameters: int) -> dict[str, Any]:
    named = lambda name: main if name == "selected" else name  # noqa: E731
    units = [json.loads(file.read_text()) for file in sorted((run / "state").glob("*.json"))]
    keys = ("loss", "loss_ci95", "num_samples", "num_target_tokens")
    return {
        "models": {
            named(model): {which: {key: found[key] for key in keys} for which, found in sets.items()}
            for model, sets in evaluation["models"].items()
        },
        "accuracy": {
            named(model): {task: found["accuracy_by_characters"] for task, found in tasks.items()}
            for model, tasks in evaluation["tasks"].items()
        },
        "kept": {named(name): kept for name, kept in _kept(run).items() if name in evaluation["models"]},
        "cost": {named(name): cost for name, cost in _flops(study, run, parameters).items()},
        "seconds": {unit["unit"].replace("/selected", f"/{main}"): unit["seconds"] for unit in units},
    }


def _selections(run: Path) -> dict[str, Path]:
    """The folder of each subset by name; `selected` is the main one."""
    named = {file.parent.name: file.parent for file in (run / "selection/variants").glob("*/selection.json")}
    return {"selected": run / "selection"} | dict(sorted(named.items()))


def _kept(run: Path) -> dict[str, Any]:
    kept = {}
    for name, folder in _selections(run).items():
        composition = json.loads((folder / "selection.json").read_text())["composition"].get("kind", {})
        kept[name] = {kind: found["selected"] for kind, found in composition.items()}
    return kept


def _flops(study: Study, run: Path, parameters: int) -> dict[str, float]:
    """FLOPs of the probe and of each model's training by the usual count: 6 per parameter and trained token (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1), 4 per recorded one, whose backward makes no weight gradients. Attention's are left out."""
    rows = pq.read_table(run / "scores/table.parquet", columns=["sample_id", "num_tokens"])
    tokens = dict(zip(rows["sample_id"].to_pylist(), rows["num_tokens"].to_pylist(), strict=True))
    everything = sum(tokens.values())
    train = 6.0 * parameters
    epochs = study.run["sft"]["epochs"]
    found = {
        "probe": everything * (train * study.run["probe"]["epochs"] + 4.0 * parameters),
        "full": train * everything * epochs,
    }
    settings = yaml.safe_load((run / "config.yaml").read_text())
    trained = ["selected", *settings["sft"]["variants"]]
    for name, folder in ((name, folder) for name, folder in _selections(run).items() if name in trained):
        table = pq.read_table(folder / "selection.parquet", columns=["sample_id", "selected"])
        marks = zip(table["sample_id"].to_pylist(), table["selected"].to_pylist(), strict=True)
        chosen = np.array([tokens[i] for i, taken in marks if taken], float)
        shown = len(chosen) if settings["sft"]["equal"] == "epochs" else len(tokens)
        found[name] = train * float(chosen.mean()) * shown * epochs
    return found


def _parameters(model: Path) -> int:
    """The number of parameters of a model folder, each tensor of its safetensors files once."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as content:
            (size,) = struct.unpack("<Q", content.read(8))
            header: Mapping[str, Any] = json.loads(content.read(size))
        shapes |= {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    return int(sum(np.prod(shape) for shape in shapes.values()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--material", type=Path, required=True, help="folder that holds the models and data the study names"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; they share the machine's cores")
    parser.add_argument("--collect", action="store_true", help="run nothing; gather what is finished")
    options = parser.parse_args()
    study = Study.model_validate(yaml.safe_load(options.study.read_text()))
    material = options.material.resolve()
    work = [] if options.collect else list(cells(study))
    threads = max(1, len(os.sched_getaffinity(0)) // (options.jobs * options.ranks))
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as workers:
        try:
            running = {workers.submit(run_cell, study, material, cell, options.ranks, threads): cell for cell in work}
            for number, done in enumerate(as_completed(running), 1):
                done.result()
                spent = time.monotonic() - began
                print(f"study: {number} of {len(work)}: {running[done].folder} after {spent:.0f} s", flush=True)
                _publish(study, material)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    _publish(study, material)


def _publish(study: Study, material: Path) -> None:
    results = Path(study.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(collect(study, material), indent=1) + "\n")


if __name__ == "__main__":
    main()
