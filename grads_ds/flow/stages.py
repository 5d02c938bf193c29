"""The flow: prepare -> probe -> select -> sft -> evaluate -> report, as stages and their units.

A stage is one or more units (the preliminary training and the recording; one subset; one model), so
that an interrupted or partly changed run repeats only what it must. Each unit names the inputs that
decide whether it is due. No torch import until a unit that computes is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.run_dir.digests import content_digest
from grads_ds.run_dir.layout import MAIN, model_folder, scores_unit, selection_folder, trained_names
from grads_ds.run_dir.units import unit_id, why_due

_KEEPING = ("checkpoint_steps", "checkpoints_kept")  # no model depends on them


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is redone as a whole.

    `inputs` decide whether it is due; `outputs` are its files.
    """

    name: str
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    work: Callable[[Config, Path], None]


@dataclass(frozen=True)
class Stage:
    """One step of the flow. `distributed` stages run on every rank, the others on one process."""

    name: str
    distributed: bool
    units: Callable[[Config, Path], list[Unit]]


def _prepare_units(config: Config, run_dir: Path) -> list[Unit]:
    def work(config: Config, run_dir: Path) -> None:
        from grads_ds.data.stage import run_prepare

        run_prepare(config, run_dir)

    sources = [source for group in config.prepared_sets().values() for source in group]
    inputs = {
        "data": config.data.model_dump(mode="json"),
        "model.path": config.model.path,
        "model.chat_template": config.model.chat_template,
        "tokenizer files": content_digest(config.model.path, weights=False),
        "data files": {source: content_digest(source) for source in sources},
        "chat template file": content_digest(config.model.chat_template),
    }
    return [Unit("prepare", inputs, ("prepared",), work)]


def _probe_units(config: Config, run_dir: Path) -> list[Unit]:
    def train(config: Config, run_dir: Path) -> None:
        from grads_ds.probe.stage import run_preliminary_training

        run_preliminary_training(config, run_dir)

    def record(config: Config, run_dir: Path) -> None:
        from grads_ds.probe.stage import run_recording

        run_recording(config, run_dir)

    probe = config.probe.model_dump(mode="json", exclude={"flush_seconds", *_KEEPING})
    recording = {
        key: probe.pop(key) for key in ("layers", "tokens_per_microbatch", "loss_reduction")
    }
    names = ("extras", "anchor", "other_prompts", "contrast_rows")
    extras, controls = {key: probe.pop(key) for key in names}, probe.pop("controls")
    recording |= extras if extras["extras"] else {}
    recording |= {"controls": controls} if controls else {}
    model = _model_inputs(config) | {"prepare": unit_id(run_dir, "prepare"), "seed": config.seed}
    scores = ("scores/table.parquet", "scores/manifest.json")
    if config.probe.epochs == 0:
        return [Unit("probe/record", model | {"probe": recording}, scores, record)]
    training = model | {"probe": probe, "deepspeed": config.deepspeed_json()}
    if config.probe.record == "during":
        return [
            Unit(
                "probe/train", training | {"recording": recording}, (*scores, "probe/model"), train
            )
        ]
    return [
        Unit("probe/train", training, ("probe/model",), train),
        Unit(
            "probe/record",
            {"probe": recording, "training": unit_id(run_dir, "probe/train")},
            scores,
            record,
        ),
    ]


def _select_units(config: Config, run_dir: Path) -> list[Unit]:
    def unit(name: str | None) -> Unit:
        def work(config: Config, run_dir: Path) -> None:
            from grads_ds.selection.stage import run_variant

            run_variant(config, run_dir, name)

        folder = selection_folder(name or MAIN)
        inputs = {
            "select": config.select.resolve(name).model_dump(mode="json"),
            "seed": config.seed,
            "prepare": unit_id(run_dir, "prepare"),
            "probe": unit_id(run_dir, scores_unit(config)),
        }
        files = tuple(
            f"{folder}/{file}" for file in ("selected.jsonl", "selection.parquet", "selection.json")
        )
        return Unit(f"select/{name or MAIN}", inputs, files, work)

    return [unit(None), *(unit(name) for name in config.select.variants)]


def _sft_units(config: Config, run_dir: Path) -> list[Unit]:
    def unit(name: str) -> Unit:
        def work(config: Config, run_dir: Path) -> None:
            from grads_ds.training.sft import run_sft

            run_sft(config, run_dir, name)

        # the whole pool takes the same steps on every footing
        footing = {"equal"} if name == "full" else set()
        inputs = _model_inputs(config) | {
            "sft": config.sft.model_dump(mode="json", exclude={"variants", *_KEEPING, *footing}),
            "seed": config.seed,
            "deepspeed": config.deepspeed_json(),
            "prepare": unit_id(run_dir, "prepare"),
        }
        if name != "full":
            inputs["select"] = unit_id(run_dir, f"select/{name}")
        adapter = (str(Path(model_folder(name)).parent / "adapter"),) if config.sft.adapter else ()
        return Unit(f"sft/{name}", inputs, (model_folder(name), *adapter), work)

    return [unit(name) for name in trained_names(config)]


def _evaluate_units(config: Config, run_dir: Path) -> list[Unit]:
    def work(config: Config, run_dir: Path) -> None:
        from grads_ds.evaluate.stage import run_evaluate

        run_evaluate(config, run_dir)

    tasks = config.evaluate
    inputs = _model_inputs(config) | {
        "evaluate": config.evaluate.model_dump(mode="json"),
        "task files": (
            {
                file: content_digest(file)
                for file in (*tasks.multiple_choice.values(), *tasks.exact_match.values())
            }
            | (
                {tasks.lm_eval.include_path: content_digest(tasks.lm_eval.include_path)}
                if tasks.lm_eval
                else {}
            )
        ),
        "seed": config.seed,
        "prepare": unit_id(run_dir, "prepare"),
        "sft": {name: unit_id(run_dir, f"sft/{name}") for name in trained_names(config)},
    }
    return [Unit("evaluate", inputs, ("evaluation.json", "evaluation"), work)]


def _report_units(config: Config, run_dir: Path) -> list[Unit]:
    def work(config: Config, run_dir: Path) -> None:
        from grads_ds.report.stage import run_report

        run_report(config, run_dir)

    inputs = {
        "probe": unit_id(run_dir, scores_unit(config)),
        "select": {
            name: unit_id(run_dir, f"select/{name}") for name in [MAIN, *config.select.variants]
        },
        "evaluate": unit_id(run_dir, "evaluate"),
    }
    return [Unit("report", inputs, ("report.html",), work)]


STAGES = (
    Stage("prepare", False, _prepare_units),
    Stage("probe", True, _probe_units),
    Stage("select", False, _select_units),
    Stage("sft", True, _sft_units),
    Stage("evaluate", True, _evaluate_units),
    Stage("report", False, _report_units),
)


STAGE_NAMES = tuple(stage.name for stage in STAGES)


def due_units(stage: Stage, config: Config, run_dir: Path) -> list[tuple[Unit, str]]:
    """The stage's units that have to run, each with the reason, given what is recorded now."""
    due: list[tuple[Unit, str]] = []
    for unit in stage.units(config, run_dir):
        reason = why_due(run_dir, unit.name, unit.inputs)
        if reason is None and due and stage.name == "probe":
            # the recording follows the training inside one stage
            reason = f"{due[0][0].name} runs again"
        if reason:
            due.append((unit, reason))
    return due


def check_upstream(stage: Stage, config: Config, run_dir: Path) -> None:
    """Raise UserError when an earlier stage has to run before this one can."""
    for earlier in STAGES[: STAGES.index(stage)]:
        due = due_units(earlier, config, run_dir)
        if due:
            unit, reason = due[0]
            raise UserError(
                f"{stage.name}: wanted {earlier.name} to be finished and up to date; found"
                f" {unit.name}: {reason}; run: grads-ds run CONFIG --to {stage.name}"
            )


def _model_inputs(config: Config) -> dict[str, Any]:
    model = config.model.model_dump(mode="json", exclude={"chat_template"})
    return {"model": model, "model files": content_digest(config.model.path)}
