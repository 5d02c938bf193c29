"""A study's file: what it compares, its cells, and the config of every run.

Used by scripts/study/*.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from grads_ds.config.columns import wants_reference
from scripts.study import orders

REPO = Path(__file__).resolve().parents[2]

SETS = ("domain", "swapped", "general")
Equal = Literal["epochs", "steps"]


class Domain(BaseModel):
    """One domain: its files below the material folder, and whether defaults are chosen or confirmed
    on it.
    """

    model_config = ConfigDict(extra="forbid")
    files: list[str] = Field(min_length=1)
    role: Literal["choose", "confirm"] = "choose"
    skip_every: int | None = None


class Footing(BaseModel):
    """What is trained on one footing: budgets, and the methods and shares of noise if not all of
    the study's.
    """

    model_config = ConfigDict(extra="forbid")
    budgets: list[float] = Field(min_length=1)
    methods: list[str] | None = None
    noise: list[float] | None = None


class Probe(BaseModel):
    """Another way to record the pool's scores, compared with the study's own: keys of model, data
    and probe that differ.
    """

    model_config = ConfigDict(extra="forbid")
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    probe: dict[str, Any] = {}


class Study(BaseModel):
    """A study. `methods` are settings of select, `run` any other keys of a run's config (its
    sft.replay draws from general rows that are not held out).
    """

    model_config = ConfigDict(extra="forbid")
    out: str
    results: str
    model: str
    domains: dict[str, Domain]
    general: str
    off_domain: str
    anchor: int = 0  # rows in neither pool nor held-out sets whose gradient is a direction to go by
    anchor_from: Literal["domain", "general"] = "domain"
    pool: int = 800
    held_out: int = 150
    noise: list[float] = [0.0, 0.4]
    # needle pools: the share of a pool that is of the domain; the rest are equal parts of the other
    # domains, these sources and off_domain; noise is [0.0] then
    needle: float | None = Field(None, gt=0, lt=1)
    other_sources: dict[str, list[str]] = {}
    seeds: list[int] = [0, 1, 2]
    footings: dict[Equal, Footing] = Field(min_length=1)
    methods: dict[str, dict[str, Any]]
    full: bool = True  # whether the whole pool is trained on too
    chosen: dict[str, dict[str, Any]] = {}  # of scripts/study/real.py: chosen, not trained
    candidates: list[str] = []  # methods that may become the default, by the rule of docs/STUDY.md
    probes: dict[str, Probe] = {}  # of scripts/study/probes.py
    run: dict[str, Any] = {}

    @model_validator(mode="after")
    def _names_are_methods(self) -> Study:
        if self.needle and self.noise != [0.0]:
            raise ValueError(f"needle pools want noise: [0.0]; found {self.noise}; set it")
        named = [
            *self.candidates,
            *(name for footing in self.footings.values() for name in footing.methods or []),
        ]
        unknown = sorted(set(named) - set(self.methods))
        if unknown:
            raise ValueError(f"wanted names of methods; found {unknown}; name them under methods")
        return self


def read(file: Path) -> Study:
    """A study's YAML. `like: OTHER.yaml` (beside it) gives what it does not say itself; of `run`,
    section by section.

    Raises pydantic.ValidationError for what no study has.
    """
    given = dict(yaml.safe_load(file.read_text()))
    if other := given.pop("like", None):
        base = read(file.parent / other).model_dump(exclude_unset=True)
        sections = {
            name: {**base["run"].get(name, {}), **given.get("run", {}).get(name, {})}
            for name in base["run"]
        }
        given = {**base, **given, "run": {**given.get("run", {}), **sections}}
    return Study.model_validate(given)


@dataclass(frozen=True)
class Cell:
    """One pool: a domain, a share of noise and a seed."""

    domain: str
    noise: float
    seed: int

    @property
    def folder(self) -> str:
        """Where the cell lies below `out`."""
        return f"{self.domain}-noise{self.noise:g}-seed{self.seed}"


def cells(study: Study) -> Iterator[Cell]:
    """All cells that any footing wants, shares of noise outermost, then seeds: an interrupted
    study is a whole one with fewer of them.
    """
    for noise in study.noise:
        for seed in study.seeds:
            for domain in study.domains:
                cell = Cell(domain, noise, seed)
                if footings(study, cell):
                    yield cell


def variant(method: str, budget: float) -> str:
    """The name of a method's subset at a budget."""
    return f"{method}_{budget * 100:g}"


def method_and_budget(name: str) -> tuple[str, float]:
    """What `variant` named; raises ValueError for a model that is no subset (base, full)."""
    method, budget = name.rsplit("_", 1)
    return method, float(budget) / 100


def subsets(models: Iterable[str]) -> list[tuple[str, float]]:
    """Method and budget of every subset among the names of models, once, in their order."""
    return [
        method_and_budget(name) for name in dict.fromkeys(models) if name not in ("base", "full")
    ]


def footings(study: Study, cell: Cell) -> list[Equal]:
    """The footings this cell is run on."""
    return [
        equal
        for equal, footing in study.footings.items()
        if cell.noise in (footing.noise or study.noise)
    ]


def pairs(study: Study, equal: Equal) -> list[tuple[str, float]]:
    """Every method and budget of a footing."""
    footing = study.footings[equal]
    return [
        (method, budget)
        for budget in footing.budgets
        for method in footing.methods or study.methods
    ]


def run_config(
    study: Study, material: Path, cell: Cell, folder: Path, equal: Equal
) -> dict[str, Any]:
    """The config of one run: the first method at the first budget is the main selection, every
    other pair a variant.
    """
    settings = {
        variant(m, b): {**method_settings(study.methods[m], folder), "budget": b}
        for m, b in pairs(study, equal)
    }
    main, *others = settings
    config: dict[str, Any] = json.loads(json.dumps(study.run))
    if study.anchor:
        probe = config.setdefault("probe", {})
        extras = probe.get("extras", [])
        probe |= {
            "anchor": str(folder / "anchor.jsonl"),
            "extras": extras if wants_reference(extras) else [*extras, "anchor"],
        }
    if config.get("sft", {}).get("replay"):
        config["data"] = config.get("data", {}) | {"replay": [str(folder / "replay.jsonl")]}
    tasks = {name: str(folder / f"{name}_choice.jsonl") for name in ("domain", "general")}
    config |= {
        "run_dir": str(folder / equal),
        "seed": cell.seed,
        "model": placed(material, {"path": study.model, **config.get("model", {})}),
        "data": {
            "train": [str(folder / "pool.jsonl")],
            "validation": {name: str(folder / f"{name}.jsonl") for name in SETS},
            "metadata": ["kind"],
            **config.get("data", {}),
        },
        "select": {
            **settings[main],
            "variants": {name: _against(settings[main], settings[name]) for name in others},
        },
        "sft": {
            **config.get("sft", {}),
            "variants": [*(["full"] if study.full else []), *others],
            "equal": equal,
        },
        "evaluate": {"multiple_choice": tasks, "chat": True, **config.get("evaluate", {})},
        "deepspeed": config.get("deepspeed", "zero3"),
    }
    return config


def method_settings(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A method's settings; an order of the study's own (scripts/study/orders.py) is told its cell's
    file.
    """
    if given.get("method") != orders.METHOD:
        return given
    file = {"file": str(folder / orders.FILE)}
    return {**given, "plugin_options": {**given["plugin_options"], **file}}


def placed(material: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model with its paths made absolute: weights lie below the material, templates
    in the repository.
    """
    below = {"path": material, "chat_template": REPO}
    return {key: str(below[key] / value) if key in below else value for key, value in model.items()}


def _against(main: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A variant's settings, with the main selection's own settings put back to their defaults where
    it does not name them.
    """
    from grads_ds.config.select import SelectConfig

    defaults = SelectConfig().model_dump(mode="json")
    return {**{key: defaults[key] for key in main}, **other}
