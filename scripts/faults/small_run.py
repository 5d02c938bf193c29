"""A run small enough to be torn down a thousand times: real prepare, merge, select, export and
report; what a GPU would make (scores, a model, an evaluation) is made up and recorded as done.

Used by torture.py. `make(folder)` writes model, data and config; `STEPS` are the stages, in order,
each a function of the config that leaves files in the run directory.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from grads_ds import scores
from grads_ds.config.columns import norm_columns
from grads_ds.config.config import Config
from grads_ds.export.subset import export_subset
from grads_ds.flow.execute import execute
from grads_ds.flow.stages import STAGES as FLOW
from grads_ds.flow.stages import reopen_altered, require_done
from grads_ds.flow.unit_inputs import Unit
from grads_ds.run_dir import provenance
from grads_ds.run_dir.publish import publish_json, publish_text
from grads_ds.run_dir.units import begin, mark_done, why_due

ROWS = 40
BY_NAME = {stage.name: stage for stage in FLOW}


def make(folder: Path, model: Path) -> Config:
    """Write data beside `model` and return the config of a run in `folder`/run."""
    draw = np.random.default_rng(0)
    words = ["what", "is", "the", "color", "of", "grass", "sky", "blue", "red", "answer"]
    for name, rows in (("pool", ROWS), ("domain", 6)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for _ in range(rows):
                asked, answer = (" ".join(draw.choice(words, 6)) for _ in range(2))
                turns = [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    return Config.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "train": [str(folder / "pool.jsonl")],
                "validation": {"domain": str(folder / "domain.jsonl")},
                "max_length": 64,
            },
            "probe": {"epochs": 0},
            "select": {"budget": 0.25},
            "deepspeed": str(folder / "zero3.json"),
        }
    )


def frozen_clock() -> None:
    """No time passes and every name is drawn in the same order: two runs have the same bytes."""
    time.perf_counter = time.monotonic = time.time = lambda: 1.0e9
    time.strftime = lambda *_: "2001-09-09T01:46:40+0000"  # type: ignore[assignment]
    numbers = itertools.count(1)
    uuid.uuid4 = lambda: uuid.UUID(int=next(numbers) << 96)  # type: ignore[assignment]


def warm(config: Config) -> None:
    """Import and load, once for all forked processes, what each would take seconds for."""
    import datasets
    import datasketch  # noqa: F401
    import KDEpy  # noqa: F401

    import grads_ds.data.stage
    import grads_ds.report.stage
    import grads_ds.selection.stage
    from grads_ds.data.tokenizer import load_no_models, load_tokenizer

    load_no_models()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(config.model)
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401

    grads_ds.data.stage.load_tokenizer = lambda model: tokenizer  # type: ignore[assignment]
    versions, commit = provenance.package_versions(), provenance.source_commit()
    provenance.package_versions = lambda: versions
    provenance.source_commit = lambda: commit


def prepare(config: Config) -> None:
    _start("prepare", config)


def merge(config: Config) -> None:
    """Parts of two ranks, then the table: what the probe does on its own files."""
    run_dir = Path(config.run_dir)
    unit = _due("probe/record", config)
    if unit is None:
        return
    begin(run_dir, unit.name, unit.outputs)
    folder = run_dir / "scores"
    recording = scores.Recording({"model": "made up"}, {"ranks": 2})
    names = norm_columns(["embedding", "lm_head"])
    schema = scores.schema(names)
    scores.prepare_parts(folder, recording)
    done, totals, _ = scores.finished(folder, recording.key, schema)
    for rank in range(2):
        writer = scores.PartWriter(folder, rank, recording, schema)
        ids = [i for i in range(rank, ROWS, 2) if i not in done]
        hashes = [f"{i}" for i in ids]
        rows = {"sample_id": ids, "sample_hash": hashes, "num_tokens": np.full(len(ids), 8)}
        draw = [np.random.default_rng(i).lognormal(size=3) for i in ids]
        norms = {name: np.array([d[k] for d in draw]) for k, name in enumerate(names)}
        loss, targets = np.array([d[2] for d in draw]), np.full(len(ids), 5)
        if ids:
            writer.add(scores.make_rows(rows, loss, targets, norms))
        writer.flush()
        totals = totals + writer.totals
    scores.merge(folder, recording.key, np.arange(ROWS), {"epochs": 0}, totals)
    mark_done(run_dir, unit.name, unit.inputs, unit.outputs, 0.0)


def select(config: Config) -> None:
    _start("select", config)


def export(config: Config) -> None:
    out = Path(config.run_dir).with_name("exported")
    require_done("export", "select/selected", config, Path(config.run_dir))
    if not out.exists():  # a finished export is the user's own
        export_subset(config, Path(config.run_dir), "selected", "trl", out)


def report(config: Config) -> None:
    run_dir = Path(config.run_dir)
    for name in ("sft/selected", "evaluate"):
        unit = _due(name, config)
        if unit is None:
            continue
        begin(run_dir, name, unit.outputs)
        if name == "evaluate":
            _make_up_evaluation(run_dir)
        else:
            publish_text(run_dir / "sft/model/model.safetensors", "made up")
        mark_done(run_dir, name, unit.inputs, unit.outputs, 0.0)
    _start("report", config)


def _make_up_evaluation(run_dir: Path) -> None:
    losses = {"loss": 1.0, "loss_ci95": [0.9, 1.1], "num_samples": 6, "num_target_tokens": 30}
    models = {which: {"domain": losses} for which in ("base", "selected")}
    about = {"selected": {"method": "grads", "budget": 0.25, "num_samples": ROWS // 4}}
    publish_json(run_dir / "evaluation.json", {"models": models, "tasks": {}, "variants": about})
    publish_text(run_dir / "evaluation/base.domain.txt", "made up")


STEPS: dict[str, Callable[[Config], None]] = {
    "prepare": prepare,
    "merge": merge,
    "select": select,
    "export": export,
    "report": report,
}


def _start(name: str, config: Config) -> None:
    """As `grads-ds run` starts a stage that needs one process."""
    stage = BY_NAME[name]
    if Path(config.run_dir).is_dir():
        reopen_altered(config, Path(config.run_dir), [stage])
    execute(stage, config)


def _due(name: str, config: Config) -> Unit | None:
    units = BY_NAME[name.partition("/")[0]].units(config, Path(config.run_dir))
    unit = next(unit for unit in units if unit.name == name)
    return unit if why_due(Path(config.run_dir), name, unit.inputs) else None


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything below `folder` that a reader looks at: no locks, no logs, no records of times."""
    left_out = {"lock.json", "grads_ds_run.json"}
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        hidden_lock = file.name.startswith(".lock.json.")  # of a start that was killed taking it
        if file.name in left_out or hidden_lock or name.startswith("run/state/"):
            continue
        if file.is_file() and not name.startswith("run/scores/part-"):  # the table is compared
            found[name] = file.read_bytes()
    return found


def differences(wanted: dict[str, bytes], folder: Path) -> list[str]:
    """Names of what is now not as in `wanted`, `outputs` of the undisturbed run."""
    now = outputs(folder)
    return sorted(n for n in wanted.keys() | now.keys() if wanted.get(n) != now.get(n))
