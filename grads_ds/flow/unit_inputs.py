"""The units of each stage: what decides whether one is due, what it reads, what it writes.

No torch import until a unit that computes is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.run_dir.digests import content_digest, inputs_digest
from grads_ds.run_dir.layout import (
    MAIN,
    PARTS,
    adapter_folder,
    checkpoints_folder,
    model_folder,
    scores_unit,
    selection_folder,
    snapshot_folders,
    token_gates_folder,
    trained_names,
)
from grads_ds.run_dir.units import unit_id

BEST = "evaluate/best"  # the unit that publishes a model within a limit
_SELECTION = ("selected.jsonl", "selected.parquet", "selection.parquet", "selection.json")


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is redone as a whole.

    `inputs` decide whether it is due; `outputs` are its files, `optional` those it may leave out;
    `reads` the units whose outputs it reads; `scratch` what it keeps while it runs.
    `work(config, run_dir, identity)` does it.
    """

    name: str
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    work: Callable[[Config, Path, str], None]
    reads: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """The digest of the inputs, which everything the unit leaves half done carries."""
        return inputs_digest(self.inputs)

    @property
    def owned(self) -> list[str]:
        """What in the run directory is the unit's to replace."""
        return [*self.outputs, *self.scratch, *self.optional]


def prepare_units(config: Config, run_dir: Path) -> list[Unit]:
    def work(config: Config, run_dir: Path, identity: str) -> None:
        from grads_ds.data.stage import run_prepare

        run_prepare(config, run_dir, identity)

    sources = [source for group in config.prepared_sets().values() for source in group]
    inputs = {
        "data": config.data.inputs(),
        "model.path": config.model.path,
        "model.chat_template": config.model.chat_template,
        "tokenizer files": content_digest(config.model.path, weights=False),
        "data files": {source: content_digest(source, whole=True) for source in sources},
        "chat template file": content_digest(config.model.chat_template),
    }
    return [Unit("prepare", inputs, ("prepared",), work, scratch=(PARTS,))]


def probe_units(config: Config, run_dir: Path) -> list[Unit]:
    def train(config: Config, run_dir: Path, identity: str) -> None:
        from grads_ds.probe.preliminary_training import run_preliminary_training

        run_preliminary_training(config, run_dir, identity)

    def record(config: Config, run_dir: Path, identity: str) -> None:
        from grads_ds.probe.stage import run_recording

        run_recording(config, run_dir)

    recording = config.probe.recording_inputs()
    model = _model_inputs(config) | {"prepare": unit_id(run_dir, "prepare"), "seed": config.seed}
    scores = ("scores/table.parquet", "scores/manifest.json")
    if config.probe.epochs == 0:
        inputs = model | {"probe": recording}
        return [Unit("probe/record", inputs, scores, record, ("prepare",))]
    training = model | {
        "probe": config.probe.training_inputs(),
        "deepspeed": config.deepspeed_json(),
    }
    scratch = (checkpoints_folder("probe/train"),)
    if config.probe.record == "during":
        inputs = training | {"recording": recording}
        outputs = (*scores, "probe/model")
        return [Unit("probe/train", inputs, outputs, train, ("prepare",), scratch)]
    recorded = {"probe": recording, "training": unit_id(run_dir, "probe/train")}
    reads = ("prepare", "probe/train")
    return [
        Unit("probe/train", training, ("probe/model",), train, ("prepare",), scratch),
        Unit("probe/record", recorded, scores, record, reads),
    ]


def select_units(config: Config, run_dir: Path) -> list[Unit]:
    def unit(name: str | None) -> Unit:
        def work(config: Config, run_dir: Path, identity: str) -> None:
            from grads_ds.selection.stage import run_variant

            run_variant(config, run_dir, name)

        inputs = {
            "select": config.select.resolve(name).inputs(),
            "seed": config.seed,
            "prepare": unit_id(run_dir, "prepare"),
            "probe": unit_id(run_dir, scores_unit(config)),
        }
        folder = selection_folder(name or MAIN)
        files = tuple(f"{folder}/{file}" for file in _SELECTION)
        reads = ("prepare", scores_unit(config))
        optional = () if name else (f"{folder}/comparison.json",)
        return Unit(f"select/{name or MAIN}", inputs, files, work, reads, optional=optional)

    return [unit(None), *(unit(name) for name in config.select.variants)]


def sft_units(config: Config, run_dir: Path) -> list[Unit]:
    def unit(name: str) -> Unit:
        def work(config: Config, run_dir: Path, identity: str) -> None:
            from grads_ds.training.sft import run_sft

            run_sft(config, run_dir, name, identity)

        # the whole pool takes the same steps on every footing
        footing = {"equal"} if name == "full" else set()
        idle = set() if snapshot_folders(config, name) else {"snapshots"}
        inputs = _model_inputs(config) | {
            "sft": config.sft.inputs(exclude={"variants", *footing, *idle}),
            "seed": config.seed,
            "deepspeed": config.deepspeed_json(),
            "prepare": unit_id(run_dir, "prepare"),
        }
        reads: tuple[str, ...] = ("prepare",)
        if name != "full":
            inputs["select"] = unit_id(run_dir, f"select/{name}")
            reads = ("prepare", f"select/{name}")
        # their losses may be the probe's
        if config.sft.token_gate in ("stm", "flow") and config.probe.epochs == 0:
            inputs["scores"] = unit_id(run_dir, scores_unit(config))
            reads += (scores_unit(config),)
        outputs = (model_folder(name), *([adapter_folder(name)] if config.sft.adapter else []))
        scratch = (checkpoints_folder(f"sft/{name}"), token_gates_folder(name))
        snapshots = tuple(snapshot_folders(config, name).values())
        return Unit(f"sft/{name}", inputs, outputs, work, reads, scratch, snapshots)

    return [unit(name) for name in trained_names(config)]


def evaluate_units(config: Config, run_dir: Path) -> list[Unit]:
    def work(config: Config, run_dir: Path, identity: str) -> None:
        from grads_ds.evaluate.stage import run_evaluate

        run_evaluate(config, run_dir)

    tasks = config.evaluate
    files = [*tasks.multiple_choice.values(), *tasks.exact_match.values()]
    if tasks.lm_eval and tasks.lm_eval.include_path:
        files.append(tasks.lm_eval.include_path)
    names = trained_names(config)
    inputs = _model_inputs(config) | {
        "evaluate": config.evaluate.inputs(exclude={"max_forgetting", "forgetting"}),
        "task files": {file: content_digest(file) for file in files},
        "seed": config.seed,
        "prepare": unit_id(run_dir, "prepare"),
        "sft": {name: unit_id(run_dir, f"sft/{name}") for name in names},
    }
    reads = ("prepare", *(f"sft/{name}" for name in names))
    reads += tuple(f"select/{name}" for name in names if name != "full")  # their numbers of rows
    measured = Unit("evaluate", inputs, ("evaluation.json", "evaluation"), work, reads)
    return [measured, *_best_units(config, run_dir)]


def _best_units(config: Config, run_dir: Path) -> list[Unit]:
    """The publication of the best model, where a limit to forgetting is set."""

    def work(config: Config, run_dir: Path, identity: str) -> None:
        from grads_ds.evaluate.best import run_best

        run_best(config, run_dir)

    settings = config.evaluate
    if settings.max_forgetting is None:
        return []
    inputs = {
        "max_forgetting": settings.max_forgetting,
        "forgetting": settings.forgetting,
        "evaluate": unit_id(run_dir, "evaluate"),
    }
    reads = ("evaluate", *(f"sft/{name}" for name in trained_names(config)))
    return [Unit(BEST, inputs, ("best/choice.json",), work, reads, optional=("best/model",))]


def report_units(config: Config, run_dir: Path) -> list[Unit]:
    def work(config: Config, run_dir: Path, identity: str) -> None:
        from grads_ds.report.stage import run_report

        run_report(config, run_dir)

    chosen = [MAIN, *config.select.variants]
    inputs = {
        "probe": unit_id(run_dir, scores_unit(config)),
        "select": {name: unit_id(run_dir, f"select/{name}") for name in chosen},
        "evaluate": unit_id(run_dir, "evaluate"),
    }
    reads = ("prepare", scores_unit(config), *(f"select/{name}" for name in chosen), "evaluate")
    if config.evaluate.max_forgetting is not None:
        inputs["best"] = unit_id(run_dir, BEST)
        reads += (BEST,)
    return [Unit("report", inputs, ("report.html",), work, reads)]


def _model_inputs(config: Config) -> dict[str, Any]:
    model = config.model.inputs(exclude={"chat_template"})
    return {"model": model, "model files": content_digest(config.model.path)}
