"""Gain and forgetting as the report shows them, read from the run's files.

Reads evaluation.json, the row files it names and best/choice.json; writes nothing. No torch import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.evaluate.candidates import Candidates, read_candidates
from grads_ds.evaluate.frontier import Frontier, frontier
from grads_ds.report.run_logs import read_json


@dataclass(frozen=True)
class Forgetting:
    """Every model's gain and forgetting; random's line, where random subsets were trained; what the
    limit chose, where one was set. resamples, seed: of the intervals.
    """

    candidates: Candidates
    frontier: Frontier | None
    choice: dict[str, Any] | None
    resamples: int
    seed: int


def read_forgetting(
    run_dir: Path, evaluation: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> Forgetting | None:
    """What the run measured, None where there is no domain or general set or no file of rows.
    `config`: the resolved config as plain values.
    """
    candidates = candidates_of(run_dir, evaluation, config)
    if candidates is None or not candidates.models:
        return None
    settings = config.get("evaluate") or {}
    resamples, seed = int(settings.get("bootstrap", 1000)), int(config.get("seed", 0))
    limited = settings.get("max_forgetting") is not None
    choice = read_json(run_dir / "best/choice.json") if limited else None
    line = frontier(candidates.models, resamples, seed)
    return Forgetting(candidates, line, choice, resamples, seed)


def candidates_of(
    run_dir: Path, evaluation: Mapping[str, Any] | None, config: Mapping[str, Any]
) -> Candidates | None:
    """The models on the measure that the config limits, or on the best one that was taken."""
    settings = config.get("evaluate") or {}
    limited = settings.get("max_forgetting") is not None
    measure = settings.get("forgetting") if limited else None
    return read_candidates(evaluation, run_dir, measure) if evaluation else None
