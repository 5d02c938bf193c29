"""The config of every run of a study.

Used by scripts/study/*.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grads_ds.config.columns import wants_reference
from scripts.study import orders
from scripts.study.design import REPO, SETS, Cell, Study, pairs, variant


def run_config(
    study: Study, material: Path, cell: Cell, folder: Path, equal: str
) -> dict[str, Any]:
    """The config of one run: the first method at the first budget is the main selection, every
    other pair a variant.
    """
    settings = {
        variant(m, b): {**method_settings(study.methods[m], folder / equal), "budget": b}
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
    trainings = [config.get("sft", {}), *(footing.sft for footing in study.footings.values())]
    if any(training.get("replay") for training in trainings):  # alike for all: they share a probe
        config["data"] = config.get("data", {}) | {"replay": [str(folder / "replay.jsonl")]}
    tasks = {
        name: str(folder / f"{name}_choice.jsonl") for name in ("domain", "general", *study.tasks)
    }
    footing = study.footings[equal]
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
            **footing.sft,
            "variants": [*(["full"] if study.full else []), *others],
            "equal": footing.equal or equal,
        },
        "evaluate": {"multiple_choice": tasks, "chat": True, **config.get("evaluate", {})},
        "deepspeed": config.get("deepspeed", "zero3"),
    }
    return config


def method_settings(given: dict[str, Any], run: Path) -> dict[str, Any]:
    """A method's settings; an order of the study's own (scripts/study/orders.py) is told its cell's
    file and the run's pool.
    """
    if given.get("method") != orders.METHOD:
        return given
    places = {"file": str(run.parent / orders.FILE), "pool": str(run / "prepared/pool")}
    return {**given, "plugin_options": {**given["plugin_options"], **places}}


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
