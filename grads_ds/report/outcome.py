"""What came of the training: held-out losses, their differences, and in words whether selection was worth it.

Pure: `evaluation.json` as a dict in, rows and sentences out. Loss is in nats per target token; lower is better. A difference
is model minus reference, so a negative one is a gain. Where evaluation names files of per-sample losses, a difference gets its
own 95 % interval (paired bootstrap: the same held-out samples are redrawn for both models).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grads_ds.report.gather import MAIN

SAME_SIZE = 0.02  # two subsets are of the same size when their numbers of samples differ by at most this share
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
    """One line of the evaluation table. `trained_on`: samples (None: not trained). `randoms`: names of the random subsets of its size."""

    name: str
    method: str
    budget: float | str | None
    trained_on: int | None
    measures: dict[str, Measure]
    randoms: list[str]


@dataclass(frozen=True)
class Sentence:
    """One statement of the verdict; tone is good, bad or even."""

    text: str
    tone: str


@dataclass(frozen=True)
class Outcome:
    """The whole evaluation. `domain`: the sets that should improve; `general`: those that must not be forgotten."""

    models: list[Model]
    sets: list[str]
    domain: list[str]
    general: list[str]
    paired: bool

    def model(self, name: str) -> Model | None:
        """The model of this name, None when it was not evaluated."""
        return next((m for m in self.models if m.name == name), None)


def outcome_of(evaluation: Mapping[str, Any], run_dir: Path) -> Outcome:
    """The table's rows in order: base, full, then by size; at one size random first, then the main selection."""
    models: dict[str, Any] = evaluation.get("models", {})
    about: dict[str, Any] = evaluation.get("variants", {})
    sets = list(dict.fromkeys(name for measured in models.values() for name in measured))
    size = {name: about.get(name, {}).get("num_samples") for name in models}
    method = {name: str(about.get(name, {}).get("method", "none" if name == "base" else "?")) for name in models}

    def place(name: str) -> tuple[Any, ...]:
        group = {"base": 0, "full": 1}.get(name, 2)
        return group, size[name] or 0, method[name] != "random", name != MAIN, method[name], name

    losses = {(m, s): _sample_losses(run_dir, models[m].get(s, {})) for m in models for s in sets}
    built = []
    for name in sorted(models, key=place):
        randoms = []
        if size[name] and method[name] not in ("random", "full"):
            randoms = [n for n in models if method[n] == "random" and same_size(size[n], size[name])]
        measures = {}
        for set_name, found in models[name].items():
            ci = found.get("loss_ci95")
            measures[set_name] = Measure(
                loss=float(found["loss"]),
                perplexity=float(found.get("perplexity", math.exp(min(700.0, found["loss"])))),
                interval=(float(ci[0]), float(ci[1])) if ci else None,
                against_base=None if name == "base" else _difference(models, losses, name, ["base"], set_name),
                against_random=_difference(models, losses, name, sorted(randoms), set_name),
            )
        built.append(Model(name, method[name], about.get(name, {}).get("budget"), size[name], measures, sorted(randoms)))
    domain = _kind(sets, "domain") or sets[:1]
    general = _kind([s for s in sets if s not in domain], "general") or [s for s in sets if s not in domain]
    paired = bool(losses) and all(pair is not None for pair in losses.values())
    return Outcome(built, sets, domain, general, paired)


def same_size(one: int | None, other: int | None) -> bool:
    """Whether two numbers of samples are within SAME_SIZE of each other."""
    return bool(one and other) and abs(one - other) <= SAME_SIZE * max(one, other)  # type: ignore[operator]


def paired_interval(
    losses: np.ndarray, references: list[np.ndarray], tokens: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the token-mean loss minus the mean of the references' token-mean losses.

    `losses`, each of `references`: float64 [N], a sample's mean loss over its target tokens; `tokens` int64 [N]. Samples are
    redrawn whole, the same ones for every model.
    """
    gap = (losses - np.mean(references, axis=0)) * tokens
    rng = np.random.default_rng(seed)
    found = np.empty(resamples)
    for i in range(resamples):
        draw = rng.integers(len(gap), size=len(gap))
        found[i] = gap[draw].sum() / max(1, tokens[draw].sum())
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def verdict(outcome: Outcome) -> list[Sentence]:
    """What the main selection's numbers say, the unwelcome ones as plainly as the others."""
    chosen, base = outcome.model(MAIN), outcome.model("base")
    if chosen is None or base is None or not outcome.sets:
        return [Sentence("The selected subset or the base model was not evaluated: there is no verdict.", "even")]
    full = outcome.model("full")
    said = []
    for name in outcome.domain:
        mine = chosen.measures.get(name)
        if mine is None or mine.against_base is None:
            continue
        gap = mine.against_base
        said.append(Sentence(
            f"On {name}, training on the {chosen.trained_on:,} selected samples {_moved(gap.value)} the loss from "
            f"{base.measures[name].loss:.4f} (base) to {mine.loss:.4f}{_sure(gap)}.", gap.tone,
        ))  # fmt: skip
        if full is not None and name in full.measures:
            other = full.measures[name].loss
            rest = mine.loss - other
            said.append(Sentence(
                f"The full pool ({full.trained_on:,} samples) reaches {other:.4f}: the subset is "
                + (f"{abs(rest):.4f} {'better' if rest < 0 else 'worse'}" if round(rest, 4) else "level with it")
                + ".", "good" if rest <= 0 else "bad",
            ))  # fmt: skip
        said.append(_random_sentence(outcome, chosen, name, mine))
    for name in outcome.general:
        mine = chosen.measures.get(name)
        if mine is None or mine.against_base is None:
            continue
        gap = mine.against_base
        others = [(full, "full pool")] + [(outcome.model(r), f"random ({r})") for r in chosen.randoms]
        compared = ", ".join(
            f"{label} {m.measures[name].against_base.value:+.4f}"  # type: ignore[union-attr]
            for m, label in others
            if m is not None and name in m.measures and m.measures[name].against_base is not None
        )
        what = "it forgot" if gap.value > 0 else "nothing was forgotten"
        said.append(Sentence(
            f"On {name}, the loss changed by {gap.value:+.4f} from the base's {base.measures[name].loss:.4f}{_sure(gap)}: {what}."
            + (f" For comparison: {compared}." if compared else ""), gap.tone,
        ))  # fmt: skip
    return said


def _random_sentence(outcome: Outcome, chosen: Model, name: str, mine: Measure) -> Sentence:
    gap = mine.against_random
    if gap is None:
        return Sentence(
            f"No random subset of {chosen.trained_on:,} samples was trained: whether the selection is better than chance is not "
            "known. Add a variant with method random to select.variants and sft.variants.", "even",
        )  # fmt: skip
    draws = len(chosen.randoms)
    reach = np.mean([m.measures[name].loss for r in chosen.randoms if (m := outcome.model(r)) is not None and name in m.measures])
    who = f"A random subset of the same size reaches {reach:.4f}" if draws == 1 else (
        f"{draws} random subsets of the same size reach {reach:.4f} on average")  # fmt: skip
    if gap.tone == "good":
        text = f"{who}: selection beat random by {-gap.value:.4f}{_sure(gap)}."
    elif gap.value < 0:
        text = f"{who}: selection did not clearly beat random, its lead of {-gap.value:.4f} is within chance{_sure(gap)}."
    elif round(gap.value, 4) == 0:
        text = f"{who}: selection did not beat random, they are level{_sure(gap)}."
    else:
        text = f"{who}: selection did not beat random, it is {gap.value:.4f} worse{_sure(gap)}."
    if draws == 1:
        text += " This is one random draw; another may fall differently."
    return Sentence(text, gap.tone)


def _difference(
    models: dict[str, Any], losses: dict[tuple[str, str], Any], name: str, references: list[str], set_name: str
) -> Difference | None:
    references = [r for r in references if set_name in models.get(r, {})]
    if not references:
        return None
    value = float(models[name][set_name]["loss"]) - float(np.mean([models[r][set_name]["loss"] for r in references]))
    mine, theirs = losses[name, set_name], [losses[r, set_name] for r in references]
    if mine is None or any(pair is None or not np.array_equal(pair[1], mine[1]) for pair in theirs):
        return Difference(value, None)
    return Difference(value, paired_interval(mine[0], [pair[0] for pair in theirs], mine[1]))


def _sample_losses(run_dir: Path, found: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """(loss float64 [N], num_target_tokens int64 [N]) of the parquet file the measurement names; None without one."""
    name = found.get("sample_losses_file")
    if not isinstance(name, str) or not (run_dir / name).is_file():
        return None
    try:
        table = pq.read_table(run_dir / name, columns=["loss", "num_target_tokens"])
    except (OSError, ValueError):  # another format than ours: the intervals are left out
        return None
    return table["loss"].to_numpy().astype(np.float64), table["num_target_tokens"].to_numpy().astype(np.int64)


def _kind(sets: list[str], word: str) -> list[str]:
    return [s for s in sets if s == word] or [s for s in sets if s.startswith(word)]


def _moved(gap: float) -> str:
    return "lowered" if gap < 0 else "raised" if gap > 0 else "left"


def _sure(gap: Difference) -> str:
    return f" (95 % interval {gap.interval[0]:+.4f} to {gap.interval[1]:+.4f})" if gap.interval else ""
