"""The study: does a subset chosen by gradients teach more and make forget less than a random one, and where?

    python scripts/study.py configs/study/small.yaml --material FOLDER [--ranks 1] [--collect]

Reads a study's YAML and the models and data it names below FOLDER. For every domain, share of planted faults, seed and footing
(equal epochs or equal steps) it runs the pipeline (`grads-ds run`) on a pool of its own, every method and budget a variant of
the one run. Writes the runs below `out` and the numbers of all of them to `results` (JSON), from which
scripts/study_tables.py makes the tables. Resumable: what is finished is skipped. --collect only gathers what there is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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


class Study(BaseModel):
    """A study. `methods` are settings of select, `run` any other keys of a run's config."""

    model_config = ConfigDict(extra="forbid")
    out: str
    results: str
    model: str
    domains: dict[str, Domain]
    general: str
    off_domain: str
    anchor: str | None = None  # general rows of their own, for methods that spare general knowledge
    pool: int = 800
    held_out: int = 150
    noise: list[float] = [0.0, 0.4]
    seeds: list[int] = [0, 1, 2]
    budgets: list[float] = [0.05]
    equal: list[Literal["epochs", "steps"]] = ["epochs"]
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
    """All cells, seeds outermost, so that an interrupted study is a whole one with fewer seeds."""
    for seed in study.seeds:
        for noise in study.noise:
            for domain in study.domains:
                yield Cell(domain, noise, seed)


def variant(method: str, budget: float) -> str:
    """The name of a method's subset at a budget."""
    return f"{method}_{budget * 100:g}"


def run_config(study: Study, cell: Cell, material: Path, folder: Path, equal: str) -> dict[str, Any]:
    """The config of one run: the first method at the first budget is the main selection, every other pair a variant."""
    pairs = [(method, budget) for budget in study.budgets for method in study.methods]
    settings = {variant(m, b): {**study.methods[m], "budget": b} for m, b in pairs}
    main, *others = settings
    config: dict[str, Any] = json.loads(json.dumps(study.run))
    if study.anchor:
        probe = config.setdefault("probe", {})
        probe |= {"anchor": str(material / study.anchor), "extras": [*probe.get("extras", []), "anchor"]}
    config |= {
        "run_dir": str(folder / equal),
        "seed": cell.seed,
        "model": {"path": str(material / study.model), **config.get("model", {})},
        "data": {
            "train": [str(folder / "pool.jsonl")],
            "validation": {name: str(folder / f"{name}.jsonl") for name in ("domain", "swapped", "general")},
            "metadata": ["kind"],
            **config.get("data", {}),
        },
        "select": {**settings[main], "variants": {name: _against(settings[main], settings[name]) for name in others}},
        "deepspeed": str(REPO / config.get("deepspeed", "configs/deepspeed/zero3.json")),
    }
    config["sft"] = {**config.get("sft", {}), "variants": ["full", *others], "equal": equal}
    return config


def _against(main: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A variant's settings, with the main selection's own settings put back to their defaults where it does not name them."""
    from grads_ds.config import SelectConfig

    defaults = SelectConfig().model_dump(mode="json")
    return {**{key: defaults[key] for key in main}, **other}


def run_cell(study: Study, cell: Cell, material: Path, ranks: int) -> None:
    """Make the cell's pool and run it on every footing. The probe and the choice are made once and shared."""
    folder = Path(study.out).resolve() / cell.folder
    if not (folder / "general.jsonl").is_file():
        domain = study.domains[cell.domain]
        study_pools.write_cell(
            folder,
            study_pools.read_rows([material / file for file in domain.files], domain.skip_every),
            study_pools.read_rows([material / study.off_domain]),
            study_pools.read_rows([material / study.general]),
            pool=study.pool,
            held_out=study.held_out,
            noise=cell.noise,
            seed=cell.seed,
        )
    first = folder / study.equal[0]
    for equal in study.equal:
        config = folder / f"{equal}.yaml"
        config.write_text(yaml.safe_dump(run_config(study, cell, material, folder, equal), sort_keys=False))
        if not (folder / equal / "evaluation.json").is_file():
            if equal == study.equal[0]:
                _grads_ds(config, ranks, "--to", "select")
            elif not (folder / equal / "scores").is_dir():
                shutil.copytree(
                    first, folder / equal, ignore=shutil.ignore_patterns("sft", "tensorboard", "evaluation*")
                )
            _grads_ds(config, ranks, "--to", "evaluate")
        for weights in (folder / equal).rglob("*.safetensors"):  # the numbers are kept, gigabytes of models are not
            if "sft" in weights.parts:
                weights.write_bytes(b"")


def _grads_ds(config: Path, ranks: int, *arguments: str) -> None:
    log = config.with_suffix(".log")
    with open(log, "a") as output:
        command = [sys.executable, "-m", "grads_ds", "run", str(config), "--ranks", str(ranks), *arguments]
        if subprocess.run(command, cwd=REPO, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"study: {config} failed; its last words are in {log}")


def collect(study: Study) -> dict[str, Any]:
    """Every finished run's numbers: losses by model and set, what was kept of each kind, seconds and tokens of every unit."""
    records = []
    for cell in cells(study):
        for equal in study.equal:
            run = Path(study.out) / cell.folder / equal
            if not (run / "evaluation.json").is_file():
                continue
            evaluation = json.loads((run / "evaluation.json").read_text())
            units = [json.loads(file.read_text()) for file in sorted((run / "state").glob("*.json"))]
            records.append(
                asdict(cell)
                | {
                    "equal": equal,
                    "role": study.domains[cell.domain].role,
                    "models": {
                        _name(study, name): {which: _numbers(found) for which, found in sets.items()}
                        for name, sets in evaluation["models"].items()
                    },
                    "kept": {_name(study, name): kept for name, kept in _kept(run).items()},
                    "seconds": {unit["unit"]: unit["seconds"] for unit in units},
                }
            )
    return {"study": study.model_dump(mode="json"), "runs": records}


def _name(study: Study, name: str) -> str:
    return variant(next(iter(study.methods)), study.budgets[0]) if name == "selected" else name


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("loss", "loss_ci95", "num_samples", "num_target_tokens")}


def _kept(run: Path) -> dict[str, Any]:
    kept = {}
    for file in [run / "selection/selection.json", *sorted((run / "selection/variants").glob("*/selection.json"))]:
        composition = json.loads(file.read_text())["composition"].get("kind", {})
        name = "selected" if file.parent.name == "selection" else file.parent.name
        kept[name] = {kind: found["selected"] for kind, found in composition.items()}
    return kept


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--material", type=Path, required=True, help="folder that holds the models and data the study names"
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--collect", action="store_true", help="run nothing; gather what is finished")
    options = parser.parse_args()
    study = Study.model_validate(yaml.safe_load(options.study.read_text()))
    work = list(cells(study))
    began = time.monotonic()
    for number, cell in enumerate(() if options.collect else work, 1):
        run_cell(study, cell, options.material.resolve(), options.ranks)
        spent = time.monotonic() - began
        print(f"study: {number} of {len(work)}: {cell.folder} after {spent:.0f} s", flush=True)
        _publish(study)
    _publish(study)


def _publish(study: Study) -> None:
    results = Path(study.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(collect(study), indent=1) + "\n")


if __name__ == "__main__":
    main()
