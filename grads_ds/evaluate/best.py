"""The model a run publishes: the largest gain within the limit to forgetting.

Reads evaluation.json, the row files and the models; writes `best/choice.json`, and `best/model`
when a model keeps the limit. A trained model's files are linked, not copied, where the file system
allows it; an interpolation is merged again. Run at the end of the evaluate stage.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.distributed import heartbeat, ranks
from grads_ds.engine.base_folder import base_folder
from grads_ds.engine.interpolation import interpolate
from grads_ds.evaluate.candidates import Candidate, Candidates, read_candidates
from grads_ds.evaluate.forgetting_limit import Choice, Judged, choose
from grads_ds.evaluate.made_models import made_folder
from grads_ds.evaluate.merged_card import merged_card
from grads_ds.run_dir.publish import atomic_path, publish_json

CHOICE, MODEL = "best/choice.json", "best/model"


def run_best(config: Config, run_dir: Path) -> None:
    """Choose and publish, on rank 0 while the others wait."""
    ranks.from_main(lambda: _publish(config, run_dir))


def _publish(config: Config, run_dir: Path) -> None:
    settings = config.evaluate
    assert settings.max_forgetting is not None
    evaluation = json.loads((run_dir / "evaluation.json").read_bytes())
    candidates = read_candidates(evaluation, run_dir, settings.forgetting)
    if candidates is None:
        wanted = f"rows of {settings.forgetting} and of the domain sets under {run_dir}/evaluation"
        raise UserError(
            problem("evaluate.max_forgetting", wanted, "none", "run the evaluate stage again")
        )
    choice = choose(candidates.models, settings.max_forgetting, settings.bootstrap, config.seed)
    if choice.chosen is None:
        shutil.rmtree(run_dir / MODEL, ignore_errors=True)
        print(
            f"best: no model keeps forgetting ({candidates.what}) within {choice.limit:g}"
            f" {candidates.unit}: none is published",
            flush=True,
        )
    else:
        _write_model(config, run_dir, candidates, choice, choice.chosen.candidate)
        print(f"best: {choice.chosen.candidate.name} is published as {run_dir / MODEL}", flush=True)
    publish_json(run_dir / CHOICE, choice_record(candidates, choice))


def _write_model(
    config: Config, run_dir: Path, candidates: Candidates, choice: Choice, best: Candidate
) -> None:
    source = made_folder(run_dir, best.of, best.steps)
    facts = [
        ("forgetting", f"{candidates.what}, {candidates.unit}"),
        ("limit", f"{choice.limit:g}"),
        ("gain on the domain sets", f"{best.gain.mean:.4f} nats per target token"),
    ]
    if best.steps is not None:
        facts.append(("stopped after", f"{best.steps:.0%} of its steps"))
    if choice.chosen is not None:
        facts.append(("forgetting, upper bound", f"{choice.chosen.bound:.4f}"))
    if choice.audit is not None:
        facts.append(("forgetting on the audit half", f"{choice.audit.forgetting:.4f}"))
    with atomic_path(run_dir / MODEL) as aside:
        if best.alpha is None:
            shutil.copytree(source, aside, copy_function=_link)
        else:
            aside.mkdir()
            interpolate(base_folder(config), source, best.alpha, aside, heartbeat.beat)
        card = aside / "README.md"
        card.unlink(missing_ok=True)  # never through a link
        card.write_text(merged_card(config, best.of, best.alpha, facts))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def choice_record(candidates: Candidates, choice: Choice) -> dict[str, Any]:
    """best/choice.json."""
    return {
        "measure": candidates.measure,
        "what": candidates.what,
        "unit": candidates.unit,
        "limit": choice.limit,
        "level": choice.level,
        "chosen": _judged(choice.chosen) if choice.chosen else None,
        "unlimited": _judged(choice.unlimited),
        "cost_in_gain": (
            {"value": choice.cost[0], "ci95": list(choice.cost[1])} if choice.cost else None
        ),
        "audit": (
            {
                "forgetting": choice.audit.forgetting,
                "ci95": list(choice.audit.interval),
                "rows": choice.audit.rows,
                "within": choice.audit.within,
            }
            if choice.audit
            else None
        ),
        "candidates": [_judged(judged) for judged in choice.judged],
    }


def _judged(judged: Judged) -> dict[str, Any]:
    return {
        "name": judged.candidate.name,
        "kind": judged.candidate.kind,
        "of": judged.candidate.of,
        "alpha": judged.candidate.alpha,
        "gain": judged.gain,
        # null where the choice half has too few rows to tell
        "forgetting": judged.forgetting if math.isfinite(judged.forgetting) else None,
        "bound": judged.bound if math.isfinite(judged.bound) else None,
        "within": judged.within,
    }
