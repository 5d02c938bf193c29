"""How long a whole run still takes: from what its own units took, for those that are left.

Reads the run directory alone. A training unit goes by the samples that it takes, at the rate of the
trainings before it; the evaluation by the held-out samples and models, at the rate of the
recording, whose backward it does not have. What nothing tells of is named, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from grads_ds.config.config import Config
from grads_ds.launcher.records import read
from grads_ds.launcher.status_text import span
from grads_ds.run_dir.layout import scores_unit, selection_folder, trained_names
from grads_ds.run_dir.provenance import RESOLVED


def time_left(run_dir: Path, seen: Mapping[str, Any]) -> str:
    """One sentence for a run that is at work; "" when nothing can be said of it.

    `seen`: its snapshot (job_status.py).
    """
    config = _config(run_dir)
    job = seen["job"]
    if config is None or not job:
        return ""
    took = {str(r["unit"]): float(r["seconds"] or 0.0) for r in seen["finished"]}
    due = [name for name in long_units(config) if name not in took]
    seconds, unknown = 0.0, []
    rates = _rates(config, run_dir, took)
    for name in due:
        if name.split("/")[0] == job["stage"] and job["outcome"] is None and name == due[0]:
            own = job["eta_seconds"]  # of the unit at work
        else:
            own = _estimate(config, run_dir, name, rates)
        if own is None:
            unknown.append(name)
        else:
            seconds += own
    if not seconds:
        return ""
    at_least = f"at least, without {', '.join(unknown)}" if unknown else "left"
    return f"about {span(seconds)} {at_least}"


def long_units(config: Config) -> list[str]:
    """The units of a run in order, without selection and report, which take seconds. Their names
    alone: what they depend on may not be on this machine.
    """
    trained = ["probe/train"] if config.probe.epochs > 0 else []
    probe = dict.fromkeys([*trained, scores_unit(config)])
    return ["prepare", *probe, *(f"sft/{name}" for name in trained_names(config)), "evaluate"]


def _config(run_dir: Path) -> Config | None:
    try:
        tree = yaml.safe_load((run_dir / RESOLVED).read_text(encoding="utf-8"))
        tree.pop("provenance", None)
        return Config.model_validate(tree)
    except (OSError, yaml.YAMLError, AttributeError, ValidationError):
        return None  # not written yet, or of another version


def _rates(config: Config, run_dir: Path, took: Mapping[str, float]) -> dict[str, float]:
    """Seconds a sample, of the last finished unit of each kind."""
    rates = {}
    for name, seconds in took.items():
        samples = _samples(config, run_dir, name)
        if samples:
            rates["record" if name == "probe/record" else "train"] = seconds / samples
    return rates


def _estimate(config: Config, run_dir: Path, name: str, rates: Mapping[str, float]) -> float | None:
    kind = "record" if name.split("/")[0] in ("evaluate", "probe/record") else "train"
    kind = "record" if name == "probe/record" else kind
    samples = _samples(config, run_dir, name)
    return None if samples is None or kind not in rates else samples * rates[kind]


def _samples(config: Config, run_dir: Path, name: str) -> float | None:
    """Samples that a unit takes, epochs included; None where that is not known yet, or where it is
    no unit of that kind.
    """
    sets = read(run_dir / "prepared/prepared.json").get("sets", {})
    pool = sets.get("pool", {}).get("kept")
    stage, _, variant = name.partition("/")
    if stage == "evaluate":
        held = [sets.get(one, {}).get("kept") for one in config.data.validation]
        if None in held:
            return None
        # the base model and every trained one
        return float(sum(held) * (2 + len(set(config.sft.variants))))
    if name == "probe/train":
        return None if pool is None else pool * config.probe.epochs
    if name == "probe/record":
        return pool
    if stage != "sft":
        return None
    if variant == "full":
        return None if pool is None else pool * config.sft.epochs
    counts = read(run_dir / selection_folder(variant) / "selection.json").get("counts", {})
    chosen = counts.get("selected")
    return None if chosen is None else chosen * config.sft.epochs
