"""A study's file: what it compares, and its cells.

Used by scripts/study/*.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    the study's. Its name says what is equal, or else `equal` does; `sft`: keys that differ.
    """

    model_config = ConfigDict(extra="forbid")
    equal: Equal | None = None
    sft: dict[str, Any] = {}
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
    choices: int = Field(3, ge=2)  # answers that a held-out question is asked with
    like_topic: bool = False  # the wrong ones are those of the most alike questions, not drawn
    tasks: dict[str, str] = {}  # name -> rows whose answers begin with yes, no or maybe
    footings: dict[str, Footing] = Field(min_length=1)
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
        unsaid = [
            name
            for name, footing in self.footings.items()
            if footing.equal is None and name not in get_args(Equal)
        ]
        if unsaid:
            raise ValueError(f"wanted equal: epochs or steps in footings {unsaid}; found none")
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
    section by section, where null takes a key away.

    Raises pydantic.ValidationError for what no study has.
    """
    given = dict(yaml.safe_load(file.read_text()))
    if other := given.pop("like", None):
        base = read(file.parent / other).model_dump(exclude_unset=True)
        run = {**base["run"], **given.get("run", {})}
        for name, section in base["run"].items():
            if isinstance(section, dict):
                section = {**section, **given.get("run", {}).get(name, {})}
                run[name] = {key: value for key, value in section.items() if value is not None}
        given = {**base, **given, "run": run}
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


def footings(study: Study, cell: Cell) -> list[str]:
    """The footings this cell is run on."""
    return [
        equal
        for equal, footing in study.footings.items()
        if cell.noise in (footing.noise or study.noise)
    ]


def pairs(study: Study, equal: str) -> list[tuple[str, float]]:
    """Every method and budget of a footing."""
    footing = study.footings[equal]
    return [
        (method, budget)
        for budget in footing.budgets
        for method in footing.methods or study.methods
    ]
