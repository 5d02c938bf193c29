"""The flow: prepare -> probe -> select -> sft -> evaluate -> report, what each depends on, and what
is due.

Reads the config and the run directory's records; runs the units that are due and records them as
done. A stage is one or more units (the preliminary training and the recording; one subset; one
model), so that an interrupted or partly changed run repeats only what it must. No torch import
until a stage that computes is run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds import heartbeat
from grads_ds.config import Config, UserError
from grads_ds.run_dir import lock, mark_done, save_config, unit_id, why_due

HASH_WHOLE_BELOW = 64 * 2**20  # bytes; larger files are told apart by size and modification time
MAIN = "selected"  # the name of the main selection among the variants
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
        from grads_ds.prepare import run_prepare

        run_prepare(config, run_dir)

    sources = [source for group in config.prepared_sets().values() for source in group]
    inputs = {
        "data": config.data.model_dump(mode="json"),
        "model.path": config.model.path,
        "model.chat_template": config.model.chat_template,
        "tokenizer files": fingerprint(config.model.path, weights=False),
        "data files": {source: fingerprint(source) for source in sources},
        "chat template file": fingerprint(config.model.chat_template),
    }
    return [Unit("prepare", inputs, ("prepared",), work)]


def _probe_units(config: Config, run_dir: Path) -> list[Unit]:
    def train(config: Config, run_dir: Path) -> None:
        from grads_ds.probe import run_preliminary_training

        run_preliminary_training(config, run_dir)

    def record(config: Config, run_dir: Path) -> None:
        from grads_ds.probe import run_recording

        run_recording(config, run_dir)

    probe = config.probe.model_dump(mode="json", exclude={"flush_seconds", *_KEEPING})
    recording = {
        key: probe.pop(key) for key in ("layers", "tokens_per_microbatch", "loss_reduction")
    }
    extras = {key: probe.pop(key) for key in ("extras", "anchor")}
    recording |= extras if extras["extras"] else {}
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
            from grads_ds.sft import run_sft

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
        from grads_ds.evaluate import run_evaluate

        run_evaluate(config, run_dir)

    tasks = config.evaluate
    inputs = _model_inputs(config) | {
        "evaluate": config.evaluate.model_dump(mode="json"),
        "task files": (
            {
                file: fingerprint(file)
                for file in (*tasks.multiple_choice.values(), *tasks.exact_match.values())
            }
            | (
                {tasks.lm_eval.include_path: fingerprint(tasks.lm_eval.include_path)}
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
        from grads_ds.report import run_report

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


def trained_names(config: Config) -> list[str]:
    """The models SFT trains: the main selection and the variants, in a fixed order."""
    return [MAIN, *dict.fromkeys(config.sft.variants)]


def selection_folder(name: str) -> str:
    """Where a subset lies in the run directory."""
    return "selection" if name == MAIN else f"selection/variants/{name}"


def model_folder(name: str) -> str:
    """Where a trained model lies in the run directory."""
    return "sft/model" if name == MAIN else f"sft/variants/{name}/model"


def scores_unit(config: Config) -> str:
    """The unit that leaves the score table."""
    return (
        "probe/train"
        if config.probe.epochs > 0 and config.probe.record == "during"
        else "probe/record"
    )


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


def execute(stage: Stage, config: Config) -> int:
    """Run the stage's due units in this process (on every rank of a distributed stage); returns 0.

    Finished units are left alone. Under a launcher, a stage that needs one process runs on rank 0
    and the others leave.
    """
    from grads_ds import ranks

    run_dir = Path(config.run_dir)
    heartbeat.beat(f"{stage.name}: starting")
    if not stage.distributed:
        if ranks.launched_rank() == 0:
            with lock(run_dir, f"grads-ds {stage.name}"):
                _execute_here(stage, config, run_dir)
        return 0
    ranks.start()
    with ranks.on_main(lambda: lock(run_dir, f"grads-ds {stage.name}")):
        names = [unit.name for unit in stage.units(config, run_dir)]
        due = ranks.from_main(lambda: _announce(stage, config, run_dir))
        for name in names:
            if name not in due:
                continue
            unit = _named(stage, config, run_dir, name)
            began = time.monotonic()
            heartbeat.beat(f"{name}: loading")
            unit.work(config, run_dir)
            heartbeat.beat(f"{name}: finishing")
            ranks.barrier()
            ranks.from_main(lambda unit=unit, began=began: _finish(unit, config, run_dir, began))  # type: ignore[misc]
    ranks.finish()
    return 0


def _execute_here(stage: Stage, config: Config, run_dir: Path) -> None:
    for name in _announce(stage, config, run_dir):
        unit = _named(stage, config, run_dir, name)
        began = time.monotonic()
        unit.work(config, run_dir)
        _finish(unit, config, run_dir, began)


def _announce(stage: Stage, config: Config, run_dir: Path) -> list[str]:
    check_upstream(stage, config, run_dir)
    due = due_units(stage, config, run_dir)
    for unit, reason in due:
        print(f"{unit.name}: {reason}", flush=True)
    if not due:
        print(f"{stage.name}: done already, nothing to do", flush=True)
    return [unit.name for unit, _ in due]


def _named(stage: Stage, config: Config, run_dir: Path, name: str) -> Unit:
    return next(unit for unit in stage.units(config, run_dir) if unit.name == name)


def _finish(unit: Unit, config: Config, run_dir: Path, began: float) -> None:
    seconds = time.monotonic() - began
    # now, not before: a refused input leaves the saved config as it was
    save_config(config, run_dir)
    mark_done(run_dir, unit.name, unit.inputs, unit.outputs, seconds)
    print(f"{unit.name}: done in {seconds:.1f} s", flush=True)


# ---- inputs --------------------------------------------------------------------------------------


def _model_inputs(config: Config) -> dict[str, Any]:
    model = config.model.model_dump(mode="json", exclude={"chat_template"})
    return {"model": model, "model files": fingerprint(config.model.path)}


def fingerprint(path: str | None, weights: bool = True) -> str | None:
    """A digest of a file's or folder's content; None for a hub id or nothing.

    `weights=False` leaves weight files out.
    """
    if path is None or not Path(path).exists():
        return None
    root = Path(path)
    files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        if not weights and file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            continue
        stat = file.stat()
        digest.update(
            f"{file.relative_to(root) if root.is_dir() else file.name}:{stat.st_size}:".encode()
        )
        if stat.st_size < HASH_WHOLE_BELOW:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            digest.update(str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:32]
