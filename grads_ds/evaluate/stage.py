"""Evaluation: held-out losses, what is kept of the base model, and tasks, of the base model and of
every model made from it.

Reads `prepared/<validation name>` and the models, each loaded once for all that is asked of it;
writes `evaluation.json` and every row's numbers under `evaluation/`. A set's loss is the mean over
its target tokens, its interval a bootstrap over samples. Run by `grads-ds evaluate CONFIG` or
`deepspeed --hostfile H --module grads_ds evaluate CONFIG`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_from_disk

from grads_ds.config.config import Config
from grads_ds.config.evaluate import set_roles
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.distributed import ranks
from grads_ds.engine.whole_model import whole_model
from grads_ds.evaluate.made_models import BASE, MadeModel, made_models, model_path
from grads_ds.evaluate.measured_sets import MeasuredSet, measured_set
from grads_ds.evaluate.own_answers import answer_rows, draw_prompts, own_answers
from grads_ds.evaluate.retention import (
    RetentionPlan,
    bits_per_byte,
    flips,
    plan_retention,
    weighted_summary,
)
from grads_ds.evaluate.row_files import OWN, rows_file, tasks_file, write_right, write_rows
from grads_ds.evaluate.tasks import run_tasks, wants_tasks
from grads_ds.evaluate.token_pass import BaseStream, SetResult, TargetReader, pass_over, reading
from grads_ds.run_dir.layout import selection_folder, trained_names
from grads_ds.run_dir.publish import publish_json
from grads_ds.statistics import bootstrap_interval


@dataclass
class Evaluation:
    """What has been measured so far, and what later models are compared with."""

    config: Config
    run_dir: Path
    sets: list[MeasuredSet]
    streams: dict[str, BaseStream | None] = field(default_factory=dict)
    right: dict[str, np.ndarray] = field(default_factory=dict)  # the base model's, by task
    plan: RetentionPlan | None = None
    # wall time of rank 0, summed over the models
    seconds: dict[str, float] = field(
        default_factory=lambda: {"losses": 0.0, "retention": 0.0, "generation": 0.0}
    )
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


def run_evaluate(config: Config, run_dir: Path) -> None:
    """Measure every model on every validation set and task. Every rank calls this."""
    tokenizer = load_tokenizer(config.model)
    sets = [
        measured_set(name, load_from_disk(str(run_dir / "prepared" / name)), tokenizer)
        for name in config.data.validation
    ]
    state = Evaluation(config, run_dir, sets)
    made = ranks.from_main(lambda: made_models(config, run_dir))
    for model in made:
        with model_path(config, run_dir, model) as path, reading(config, path) as reader:
            if model.name == BASE and config.evaluate.retention is not None:
                _add_own_answers(state, reader, tokenizer)
            _measure(state, reader, model.name)
    if ranks.is_main():
        (run_dir / "evaluation").mkdir(exist_ok=True)  # without sets there are no rows in it
        publish_json(run_dir / "evaluation.json", _record(state, made))


def _add_own_answers(state: Evaluation, reader: TargetReader, tokenizer: Any) -> None:
    """Let the loaded base model answer general prompts, as many as the plan pays for, and take the
    answers among the sets.
    """
    config, settings = state.config, state.config.evaluate.retention
    assert settings is not None
    _, general = set_roles([measured.name for measured in state.sets])
    context = int(
        getattr(reader.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    )
    prompts, overlong = draw_prompts(
        [s for s in state.sets if s.name in general],
        settings.prompts,
        context - settings.new_tokens,
    )
    plan = plan_retention(
        state.sets,
        [len(prompt) for prompt in prompts],
        settings.new_tokens,
        _sizes(reader.model),
        settings.max_cost,
    )
    state.plan, prompts = plan, prompts[: plan.prompts]
    if ranks.is_main():
        left_out = f", {overlong:,} prompts without room for an answer left out" if overlong else ""
        print(
            f"retention: {plan.prompts:,} own answers, divergence at {plan.share:.1%} of the"
            f" held-out targets: {plan.cost:.0%} of the losses' work{left_out}",
            flush=True,
        )
    state.sets = [measured.thinned(plan.share) for measured in state.sets]
    if not prompts:
        return
    began = time.monotonic()
    answers = own_answers(config, state.run_dir, reader.model, tokenizer, prompts)
    state.seconds["generation"] += time.monotonic() - began
    rows = answer_rows(prompts, answers)
    state.sets.append(measured_set(OWN, rows, tokenizer).thinned(1.0))


def _sizes(model: Any) -> tuple[int, int]:
    """Parameters of the body, without embeddings, and of the head."""

    def size(parameter: Any) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    ends = {id(p): size(p) for part in (head, table) if part is not None for p in part.parameters()}
    body = sum(size(p) for p in model.parameters()) - sum(ends.values())
    return max(1, body), sum(size(p) for p in head.parameters()) if head is not None else 1


def _measure(state: Evaluation, reader: TargetReader, name: str) -> None:
    """Every set and every task for the loaded model."""
    config, base = state.config, name == BASE
    state.losses[name], state.kept[name] = {}, {"kl": {}}
    for measured in state.sets:
        began = time.monotonic()
        result, stream = pass_over(
            reader, config, measured, f"{name} on {measured.name}", state.streams.get(measured.name)
        )
        if base:
            state.streams[measured.name] = stream
        own, took = measured.name == OWN, time.monotonic() - began
        state.seconds["retention"] += took if own else result.kl_seconds
        state.seconds["losses"] += 0.0 if own else took - result.kl_seconds
        if ranks.is_main():
            write_rows(state.run_dir / rows_file(name, measured.name), measured, result, base)
        _summarise_set(state, name, measured, result)
    if wants_tasks(config.evaluate):
        with whole_model(reader.engine):
            found = run_tasks(config, reader.model, name)
        state.tasks[name] = found.numbers
        for task, right in found.right.items():
            if base:
                state.right[task] = right
            found.numbers[task]["flips"] = flips(state.right[task], right)
            if ranks.is_main():
                write_right(config, state.run_dir / tasks_file(name, task), task, right)


def _summarise_set(state: Evaluation, name: str, measured: MeasuredSet, result: SetResult) -> None:
    resamples, seed = state.config.evaluate.bootstrap, state.config.seed
    losses = summarise(result.loss, result.targets, resamples, seed) | {
        "bits_per_byte": bits_per_byte(result.loss, result.targets, measured.target_bytes),
        "sample_losses_file": rows_file(name, measured.name),
    }
    if measured.name == OWN:
        state.kept[name]["own_answers"] = losses
    else:
        state.losses[name][measured.name] = losses
    mean = result.kl_sum / np.maximum(1, result.kl_positions)
    if divergence := weighted_summary(mean, result.kl_positions, resamples, seed):
        state.kept[name]["kl"][measured.name] = divergence


def summarise(loss: np.ndarray, tokens: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Token-mean loss, perplexity and the loss's 95 % bootstrap interval (percentile method,
    samples redrawn whole).

    `loss` float64 [N] is each sample's mean over its target tokens, `tokens` int64 [N] their
    number.
    """
    mean = float((loss * tokens).sum() / tokens.sum())
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "loss_ci95": list(bootstrap_interval(loss, resamples, seed, tokens)),
        "num_samples": len(loss),
        "num_target_tokens": int(tokens.sum()),
    }


def _record(state: Evaluation, made: list[MadeModel]) -> dict[str, Any]:
    """evaluation.json: `models` are the base and the trained ones, `between` what was made of
    them.
    """
    config, run_dir = state.config, state.run_dir
    pool = len(load_from_disk(str(run_dir / "prepared/pool")))
    plain = [BASE, *trained_names(config)]
    record: dict[str, Any] = {
        "models": {name: state.losses[name] for name in plain},
        "tasks": {name: state.tasks[name] for name in plain if name in state.tasks},
        "variants": {
            name: _described(config, run_dir, name, pool) for name in trained_names(config)
        },
        "between": {
            model.name: {
                "of": model.of,
                "alpha": model.alpha,
                "steps": model.steps,
                "sets": state.losses[model.name],
            }
            | ({"tasks": state.tasks[model.name]} if model.name in state.tasks else {})
            for model in made
            if model.of is not None
        },
    }
    if state.plan is not None:
        record["retention"] = {
            "plan": vars(state.plan),
            "seconds": {kind: round(value, 3) for kind, value in state.seconds.items()},
            "models": state.kept,
        }
    return record


def _described(config: Config, run_dir: Path, name: str, pool: int) -> dict[str, Any]:
    if name == "full":
        return {"method": "full", "budget": 1.0, "num_samples": pool}
    chosen = config.select.resolve(None if name == "selected" else name)
    rows = (run_dir / selection_folder(name) / "selected.jsonl").read_text().count("\n")
    return {"method": chosen.method, "budget": chosen.budget, "num_samples": rows}
