"""What came of the training: held-out losses, their differences, and how sure they are.

Pure: `evaluation.json` as a dict in, the table's rows out. Loss is in nats per target token; lower
is better. A difference is model minus reference, so a negative one is a gain. Where evaluation
names files of per-sample losses, a difference gets its own 95 % interval (paired bootstrap: the
same held-out samples are redrawn for both models).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grads_ds.config.evaluate import set_roles
from grads_ds.run_dir.layout import MAIN
from grads_ds.statistics import bootstrap_interval

# two subsets are of the same size when their numbers of samples differ by at most this share
SAME_SIZE = 0.02
RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """Loss minus the reference's loss, and its 95 % interval where per-sample losses allow one."""

    value: float
    interval: tuple[float, float] | None

    @property
    def tone(self) -> str:
        """good, bad, or even: nothing beyond what redrawing the held-out samples gives."""
        if self.interval is not None and self.interval[0] <= 0 <= self.interval[1]:
            return "even"
        return "good" if self.value < 0 else "bad" if self.value > 0 else "even"


@dataclass(frozen=True)
class Measure:
    """One model on one held-out set."""

    loss: float
    perplexity: float
    interval: tuple[float, float] | None
    against_base: Difference | None
    against_random: Difference | None


@dataclass(frozen=True)
class Model:
    """One line of the evaluation table. `trained_on`: samples (None: not trained). `randoms`: names
    of the random subsets of its size.
    """

    name: str
    method: str
    budget: float | str | None
    trained_on: int | None
    measures: dict[str, Measure]
    randoms: list[str]


@dataclass(frozen=True)
class Outcome:
    """The whole evaluation. `domain`: the sets that should improve; `general`: those that must not
    be forgotten.
    """

    models: list[Model]
    sets: list[str]
    domain: list[str]
    general: list[str]
    paired: bool

    def model(self, name: str) -> Model | None:
        """The model of this name, None when it was not evaluated."""
        return next((m for m in self.models if m.name == name), None)


def outcome_of(evaluation: Mapping[str, Any], run_dir: Path) -> Outcome:
    """The table's rows: base, full, then by size; at one size random first, then the main
    selection.
    """
    models: dict[str, Any] = evaluation.get("models", {})
    about: dict[str, Any] = evaluation.get("variants", {})
    sets = list(dict.fromkeys(name for measured in models.values() for name in measured))
    size = {name: about.get(name, {}).get("num_samples") for name in models}
    method = {
        name: str(about.get(name, {}).get("method", "none" if name == "base" else "?"))
        for name in models
    }

    def place(name: str) -> tuple[Any, ...]:
        group = {"base": 0, "full": 1}.get(name, 2)
        return group, size[name] or 0, method[name] != "random", name != MAIN, method[name], name

    losses = {(m, s): sample_losses(run_dir, models[m].get(s, {})) for m in models for s in sets}
    built = []
    for name in sorted(models, key=place):
        randoms = []
        if size[name] and method[name] not in ("random", "full"):
            randoms = [
                n for n in models if method[n] == "random" and same_size(size[n], size[name])
            ]
        measures = {}
        for set_name, found in models[name].items():
            ci = found.get("loss_ci95")
            measures[set_name] = Measure(
                loss=float(found["loss"]),
                perplexity=float(found.get("perplexity", math.exp(min(700.0, found["loss"])))),
                interval=(float(ci[0]), float(ci[1])) if ci else None,
                against_base=(
                    None
                    if name == "base"
                    else _difference(models, losses, name, ["base"], set_name)
                ),
                against_random=_difference(models, losses, name, sorted(randoms), set_name),
            )
        built.append(
            Model(
                name,
                method[name],
                about.get(name, {}).get("budget"),
                size[name],
                measures,
                sorted(randoms),
            )
        )
    domain, general = set_roles(sets)
    paired = bool(losses) and all(pair is not None for pair in losses.values())
    return Outcome(built, sets, domain, general, paired)


def same_size(one: int | None, other: int | None) -> bool:
    """Whether two numbers of samples are within SAME_SIZE of each other."""
    if not one or not other:
        return False
    return abs(one - other) <= SAME_SIZE * max(one, other)


def paired_interval(
    losses: np.ndarray,
    references: list[np.ndarray],
    tokens: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the token-mean loss minus the mean of the references' token-mean
    losses.

    `losses`, each of `references`: float64 [N], a sample's mean loss over its target tokens;
    `tokens` int64 [N]. Samples are redrawn whole, the same ones for every model.
    """
    return bootstrap_interval(losses - np.mean(references, axis=0), resamples, seed, tokens)


def _difference(
    models: dict[str, Any],
    losses: dict[tuple[str, str], Any],
    name: str,
    references: list[str],
    set_name: str,
) -> Difference | None:
    references = [r for r in references if set_name in models.get(r, {})]
    if not references:
        return None
    value = float(models[name][set_name]["loss"]) - float(
        np.mean([models[r][set_name]["loss"] for r in references])
    )
    own, theirs = losses[name, set_name], [losses[r, set_name] for r in references]
    if own is None or any(pair is None or not np.array_equal(pair[1], own[1]) for pair in theirs):
        return Difference(value, None)
    return Difference(value, paired_interval(own[0], [pair[0] for pair in theirs], own[1]))


def sample_losses(run_dir: Path, found: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """(loss float64 [N], num_target_tokens int64 [N]) of the parquet file the measurement names;
    None without one.
    """
    name = found.get("sample_losses_file")
    if not isinstance(name, str) or not (run_dir / name).is_file():
        return None
    try:
        table = pq.read_table(
            run_dir / name, columns=["loss", "num_target_tokens"], page_checksum_verification=True
        )
    except ValueError:  # another format than ours: the intervals are left out
        return None
    return table["loss"].to_numpy().astype(np.float64), table[
        "num_target_tokens"
    ].to_numpy().astype(np.int64)
