"""The numbers of a study's finished runs, gathered from their artefacts.

Reads run directories; writes nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from safetensors import safe_open

from scripts.study.design import Study, cells, footings, pairs, variant

MEASURED = ("loss", "loss_ci95", "num_samples", "num_target_tokens")


def collect(study: Study, material: Path) -> dict[str, Any]:
    """Every finished run's numbers: losses and accuracies by model, what was kept of each kind,
    tokens, seconds and FLOPs.
    """
    parameters = parameters_of(material / study.model)
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
                    | _numbers(run, evaluation, main, parameters)
                )
    return {"study": study.model_dump(mode="json"), "parameters": parameters, "runs": records}


def _numbers(run: Path, evaluation: dict[str, Any], main: str, parameters: int) -> dict[str, Any]:
    named = lambda name: main if name == "selected" else name  # noqa: E731
    return {
        "models": {
            named(model): {
                which: {key: found[key] for key in MEASURED} for which, found in sets.items()
            }
            for model, sets in evaluation["models"].items()
        },
        "accuracy": {
            named(model): {task: found["accuracy_by_characters"] for task, found in tasks.items()}
            for model, tasks in evaluation["tasks"].items()
        },
        "kept": {
            named(name): kept for name, kept in _kept(run).items() if name in evaluation["models"]
        },
        "cost": {named(name): cost for name, cost in flops(run, parameters).items()},
        "seconds": {
            unit.replace("/selected", f"/{main}"): spent for unit, spent in seconds_of(run).items()
        },
    }


def _selections(run: Path) -> dict[str, Path]:
    """The folder of each subset by name; `selected` is the main one."""
    named = {
        file.parent.name: file.parent
        for file in (run / "selection/variants").glob("*/selection.json")
    }
    return {"selected": run / "selection"} | dict(sorted(named.items()))


def _kept(run: Path) -> dict[str, Any]:
    kept = {}
    for name, folder in _selections(run).items():
        composition = json.loads((folder / "selection.json").read_text())["composition"].get(
            "kind", {}
        )
        kept[name] = {kind: found["selected"] for kind, found in composition.items()}
    return kept


def flops(run: Path, parameters: int) -> dict[str, float]:
    """FLOPs of the probe and of each model's training by the usual count: 6 per parameter and
    trained token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Attention's own are left out.
    """
    tokens, settings = tokens_of(run), settings_of(run)
    train, epochs = 6.0 * parameters, settings["sft"]["epochs"]
    found = {"probe": probe_flops(run, parameters), "full": train * sum(tokens.values()) * epochs}
    trained = ["selected", *settings["sft"]["variants"]]
    for name, folder in (
        (name, folder) for name, folder in _selections(run).items() if name in trained
    ):
        chosen = np.array([tokens[i] for i, (_, taken) in choice(folder).items() if taken], float)
        shown = len(chosen) if settings["sft"]["equal"] == "epochs" else len(tokens)
        found[name] = train * float(chosen.mean()) * shown * epochs
    return found


def probe_flops(run: Path, parameters: int) -> float:
    """FLOPs of a run's probe: 6 per parameter and trained token (4 with LoRA, whose base has no
    weight gradients), and 4 per token of a frozen pass, which has none at all.
    """
    settings = settings_of(run)
    probe, tokens = settings["probe"], sum(tokens_of(run).values())
    trained = (4.0 if settings["model"]["lora"] else 6.0) * probe["epochs"]
    frozen = 0.0 if probe["record"] == "during" and probe["epochs"] else 4.0
    return (trained + frozen) * parameters * tokens


def choice(folder: Path) -> dict[int, tuple[float, bool]]:
    """A subset's signal of every sample by its id, and whether it was taken."""
    table = pq.read_table(folder / "selection.parquet", columns=["sample_id", "signal", "selected"])
    columns = (table[name].to_pylist() for name in ("sample_id", "signal", "selected"))
    return {i: (signal, taken) for i, signal, taken in zip(*columns, strict=True)}


def tokens_of(run: Path) -> dict[int, int]:
    """Tokens of every sample of a run's pool by its id."""
    rows = pq.read_table(run / "scores/table.parquet", columns=["sample_id", "num_tokens"])
    return dict(zip(rows["sample_id"].to_pylist(), rows["num_tokens"].to_pylist(), strict=True))


def settings_of(run: Path) -> dict[str, Any]:
    """The resolved config that a run kept."""
    return dict(yaml.safe_load((run / "resolved.yaml").read_text()))


def seconds_of(run: Path) -> dict[str, float]:
    """Wall time of every finished unit of a run."""
    units = [json.loads(file.read_text()) for file in sorted((run / "state").glob("*.json"))]
    return {unit["unit"]: unit["seconds"] for unit in units}


def parameters_of(model: Path) -> int:
    """The number of parameters of a model folder, each tensor of its safetensors files once."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  (no mapping)
    return int(sum(np.prod(shape) for shape in shapes.values()))
