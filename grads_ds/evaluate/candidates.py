"""The models that could be published, each with its gain and its forgetting row by row.

Reads evaluation.json and the row files it names; writes nothing. No torch import. Gain is the base
model's loss on the domain sets less the model's (nats per target token, above 0: learned).
Forgetting is what `evaluate.forgetting` names: kl, the divergence from the base model on its own
answers; own_loss, the loss on them less the base model's; loss, that on the general sets; or a
multiple-choice task, the base model's accuracy less the model's, in points of per cent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.evaluate import KL, LOSS, OWN_LOSS, set_roles
from grads_ds.evaluate.measured_sets import Bools
from grads_ds.evaluate.row_files import OWN, read_columns, rows_file, tasks_file
from grads_ds.statistics import Floats

BASE = "base"


@dataclass(frozen=True)
class Rows:
    """Values of N held-out rows and what each weighs in their mean; `choice` marks the half that
    models are chosen by.
    """

    values: Floats
    weights: Floats
    choice: Bools

    @property
    def mean(self) -> float:
        """The weighted mean of all rows."""
        return float((self.values * self.weights).sum() / self.weights.sum())

    def half(self, choice: bool) -> Rows:
        """The rows of one half."""
        inside = self.choice == choice
        return Rows(self.values[inside], self.weights[inside], self.choice[inside])


@dataclass(frozen=True)
class Candidate:
    """One model made from the base. kind: subset, random, full, interpolation or checkpoint; `of`:
    the trained model it is made of; samples: how many that one was trained on; steps: the share of
    its steps.
    """

    name: str
    kind: str
    of: str
    alpha: float | None
    steps: float | None
    samples: int | None
    gain: Rows
    forgetting: Rows


@dataclass(frozen=True)
class Candidates:
    """All of them, on one measure. unit: nats or points; what: the measure in words."""

    measure: str
    what: str
    unit: str
    models: list[Candidate]

    def model(self, name: str) -> Candidate | None:
        """The one of this name."""
        return next((m for m in self.models if m.name == name), None)


def read_candidates(
    evaluation: Mapping[str, Any], run_dir: Path, measure: str | None = None
) -> Candidates | None:
    """The candidates on `measure` (None: kl where it was measured, else the general loss); None
    where a set or a file that they need is not there.
    """
    sets = list(evaluation.get("models", {}).get(BASE, {}))
    domain, general = set_roles(sets)
    kept = evaluation.get("retention", {}).get("models", {}).get(BASE, {})
    measure = measure or (KL if "own_answers" in kept else LOSS)
    if not domain or (measure == LOSS and not general):
        return None
    about: dict[str, Any] = evaluation.get("variants", {})
    entries = [(name, name, None, None) for name in about]
    for name, made in evaluation.get("between", {}).items():
        entries.append((name, made["of"], made.get("alpha"), made.get("steps")))
    found = []
    try:
        for name, of, alpha, steps in entries:
            gain = _loss_rows(run_dir, name, domain, sign=-1)
            forgetting = _forgetting(run_dir, name, general, measure)
            method = str(about.get(of, {}).get("method", ""))
            kind = "subset" if method not in ("random", "full") else method
            kind = "checkpoint" if steps is not None else kind
            kind = "interpolation" if alpha is not None else kind
            samples = about.get(of, {}).get("num_samples")
            found.append(Candidate(name, kind, of, alpha, steps, samples, gain, forgetting))
    except (OSError, ValueError, KeyError):
        return None
    if not all(len(rows.values) and rows.weights.sum() for c in found for rows in _both(c)):
        return None
    return Candidates(measure, *_words(measure), found)


def _both(candidate: Candidate) -> tuple[Rows, Rows]:
    return candidate.gain, candidate.forgetting


def _words(measure: str) -> tuple[str, str]:
    """The measure in words, and its unit."""
    known = {
        KL: "divergence from the base model on its own answers",
        OWN_LOSS: "loss on the base model's own answers, less its own",
        LOSS: "loss on the general sets, less the base model's",
    }
    unit = "nats" if measure in known else "points"
    return known.get(measure, f"accuracy lost on {measure}"), unit


def _loss_rows(run_dir: Path, name: str, sets: list[str], sign: int) -> Rows:
    """sign * (the model's loss less the base model's) on the rows of all `sets`."""
    parts = []
    for measured in sets:
        names = ["loss", "num_target_tokens", "choice"]
        own, base = (
            read_columns(run_dir / rows_file(model, measured), names) for model in (name, BASE)
        )
        difference = own["loss"] - base["loss"]
        parts.append(Rows(sign * difference, own["num_target_tokens"].astype(float), own["choice"]))
    return Rows(*(np.concatenate([getattr(p, f) for p in parts]) for f in _FIELDS))


_FIELDS = ("values", "weights", "choice")


def _forgetting(run_dir: Path, name: str, general: list[str], measure: str) -> Rows:
    if measure == KL:
        found = read_columns(run_dir / rows_file(name, OWN), ["kl_sum", "kl_positions", "choice"])
        counts = found["kl_positions"].astype(float)
        return Rows(found["kl_sum"] / np.maximum(1, counts), counts, found["choice"])
    if measure in (OWN_LOSS, LOSS):
        return _loss_rows(run_dir, name, [OWN] if measure == OWN_LOSS else general, sign=1)
    own, base = (
        read_columns(run_dir / tasks_file(model, measure), ["right", "choice"])
        for model in (name, BASE)
    )
    lost = 100.0 * (base["right"].astype(float) - own["right"])
    return Rows(lost, np.ones(len(lost)), own["choice"])
