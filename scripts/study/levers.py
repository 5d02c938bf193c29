"""The study of levers against forgetting: which of them forgets less than random rows at the same
gain, and does a limit to forgetting keep what it promises?

    python scripts/study/levers.py configs/study/forgetting.yaml --material FOLDER [--jobs 8]
        [--cells medicine-noise0.4-seed0 ...] [--collect]

Runs what scripts/study/run.py runs (resumable: what is finished is skipped) and writes to `results`
(JSON), of every finished run of a pool whose first footing is finished: each model's gain and
forgetting with their 95 % intervals, its excess over random's line (forgetting less random's at the
same gain; the line is that of the first footing's random subsets, over the same rows), what the
limit chose, whether the audit half held, and what the report says first; and what each of LIMITS
would have chosen from the same rows. Pooled over pools with 95 % t-intervals. Prints them as
tables. --collect only gathers what there is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from grads_ds.config.evaluate import KL, LOSS, OWN_LOSS, set_roles
from grads_ds.evaluate.best import choice_record
from grads_ds.evaluate.candidates import BASE, Candidate, Candidates, Rows, read_candidates
from grads_ds.evaluate.forgetting_limit import choose
from grads_ds.evaluate.frontier import frontier
from grads_ds.evaluate.row_files import read_columns, rows_file
from grads_ds.report.forgetting import read_forgetting
from grads_ds.report.what_to_do import advice
from grads_ds.run_dir.publish import publish_text
from grads_ds.statistics import bootstrap_interval
from grads_ds.training.token_gates import STM_PERPLEXITY
from scripts.study.collect import settings_of
from scripts.study.design import Study, cells, footings, pairs, read, variant
from scripts.study.footings import Place, run_cells, tell_failures
from scripts.study.lever_tables import as_text, pooled, rounded

MEASURES = (KL, OWN_LOSS, LOSS)
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.3)  # nats; set before what any but 0.05 publishes was seen
Json = dict[str, Any]


def collect(study: Study) -> Json:
    """Every finished run beside a finished first footing."""
    runs = []
    for cell in cells(study):
        first = footings(study, cell)[0]
        folder = Path(study.out) / cell.folder
        for equal in footings(study, cell):
            ends = [folder / name / "best/choice.json" for name in (first, equal)]
            if all(end.is_file() for end in ends):
                about = {**vars(cell), "role": study.domains[cell.domain].role, "footing": equal}
                main = variant(*pairs(study, equal)[0])
                runs.append(about | run_numbers(folder / equal, folder / first, main))
    return {"study": study.model_dump(mode="json"), "runs": runs, "pooled": pooled(runs)}


def run_numbers(run: Path, first: Path, main: str) -> Json:
    """One run's models and choice; `first`: the run that has random's line; `main`: the name of the
    main selection.

    Raises ValueError where the two runs measured other rows.
    """
    settings, evaluation = settings_of(run), _evaluation(run)
    resamples, seed = int(settings["evaluate"]["bootstrap"]), int(settings["seed"])
    models: dict[str, Json] = {}
    for measure in MEASURES:
        own, line = (
            _candidates(_evaluation(folder), folder, measure).models for folder in (run, first)
        )
        if run == first:
            own = [model for model in own if not on_line(model)]
        excess = excess_over(own, [m for m in line if on_line(m)], resamples, seed)
        for model in own:
            entry = models.setdefault(named(model.name, main), {})
            entry.setdefault("gain", summary(model.gain, resamples, seed))
            entry[measure] = summary(model.forgetting, resamples, seed)
            entry[f"{measure}_excess"] = excess[model.name]
        if run == first:
            for model in (m for m in line if on_line(m)):
                entry = models.setdefault(model.name, {"on_line": True})
                entry.setdefault("gain", summary(model.gain, resamples, seed))
                entry[measure] = summary(model.forgetting, resamples, seed)
    found = read_forgetting(run, evaluation, settings)
    said = advice(found).headline if found is not None else None
    choice = json.loads((run / "best/choice.json").read_text())
    own_all, line_all = (
        _candidates(_evaluation(folder), folder, choice["measure"]) for folder in (run, first)
    )
    audit_line = [_audited(m) for m in line_all.models if on_line(m)]

    def told(record: Json) -> Json:
        """A choice, with its excess on the audit half of the prompts."""
        best = chosen(record, main)
        if record["chosen"] is None:
            return best
        model = own_all.model(record["chosen"]["name"])
        assert model is not None
        if run == first and on_line(model):
            return best | {"audit_excess": [0.0, 0.0, 0.0]}
        excess = excess_over([_audited(model)], audit_line, resamples, seed)
        return best | {"audit_excess": excess[model.name]}

    sweep = [
        told(choice_record(own_all, choose(own_all.models, limit, resamples, seed)))
        for limit in LIMITS
    ]
    above = unlikely(run, evaluation)
    return {"models": models, "best": told(choice), "sweep": sweep, "verdict": said, "stm": above}


def unlikely(run: Path, evaluation: Json) -> Json:
    """What a token gate of stm would leave out of the domain's held-out rows: its share of their
    target tokens, and of the base model's loss on them.
    """
    losses = [
        row
        for name in set_roles(list(evaluation["models"][BASE]))[0]
        for row in read_columns(run / rows_file(BASE, name), ["token_losses"])["token_losses"]
    ]
    found = np.concatenate([np.asarray(row, dtype=np.float64) for row in losses])
    out = found > np.log(STM_PERPLEXITY)
    shares = rounded([out.mean(), found[out].sum() / found.sum()])
    return dict(zip(("tokens", "loss"), shares, strict=True))


def chosen(choice: Json, main: str) -> Json:
    """What a limit chose, of best/choice.json."""
    best = {key: choice[key] for key in ("measure", "limit", "level")}
    best["unlimited"] = named(choice["unlimited"]["name"], main)
    best["unlimited_gain"] = round(choice["unlimited"]["gain"], 4)
    found, audit = choice["chosen"], choice["audit"]
    if found is None:
        return best | {"chosen": None}
    return best | {
        "chosen": named(found["name"], main),
        "kind": found["kind"],
        "gain": round(found["gain"], 4),
        "forgetting": round(found["forgetting"], 4),
        "bound": round(found["bound"], 4),
        "audit": rounded([audit["forgetting"], *audit["ci95"]]),
        "audit_rows": audit["rows"],
        "kept": audit["within"],
        "cost_in_gain": rounded([choice["cost_in_gain"]["value"], *choice["cost_in_gain"]["ci95"]]),
    }


def excess_over(
    models: Sequence[Candidate], line: Sequence[Candidate], resamples: int, seed: int
) -> dict[str, list[float | None]]:
    """Forgetting less random's at the same gain, and its 95 % interval, of each model by name; None
    where there is no line. Raises ValueError for models that were measured on other rows.
    """
    for model in models:
        for own, other in ((model.gain, line[0].gain), (model.forgetting, line[0].forgetting)):
            alike = np.array_equal(own.weights, other.weights)
            if not alike or not np.array_equal(own.choice, other.choice):
                raise ValueError(f"{model.name} was measured on other rows than random's line")
    # whatever they were trained on, these are held against the line
    others = [replace(model, name=f"held {model.name}", kind="subset") for model in models]
    found = frontier([*line, *others], resamples, seed)
    assert found is not None
    return {
        name.removeprefix("held "): rounded([excess.value, *(excess.interval or (None, None))])
        for name, excess in found.excess.items()
    }


def on_line(model: Candidate) -> bool:
    """Whether a model of the first footing is a point of random's line."""
    return model.kind in ("random", "full")


def named(name: str, main: str) -> str:
    """A model's name with the main selection's own in it."""
    return main + name.removeprefix("selected") if name.startswith("selected") else name


def summary(rows: Rows, resamples: int, seed: int) -> list[float | None]:
    """The weighted mean and its 95 % interval."""
    return rounded([rows.mean, *bootstrap_interval(rows.values, resamples, seed, rows.weights)])


def _audited(model: Candidate) -> Candidate:
    return replace(model, forgetting=model.forgetting.half(False))


def _evaluation(run: Path) -> Json:
    found: Json = json.loads((run / "evaluation.json").read_text())
    return found


def _candidates(evaluation: Json, run: Path, measure: str) -> Candidates:
    found = read_candidates(evaluation, run, measure)
    if found is None:
        raise ValueError(f"{run}: wanted every model's rows of {measure}; found not all of them")
    return found


def as_json(results: Mapping[str, Any]) -> str:
    """Indented, but with what holds no more objects on one line."""
    text = json.dumps(results, indent=1, allow_nan=False)
    return re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--material", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--threads", type=int, default=1, help="of one run")
    parser.add_argument("--cells", nargs="+", help="these alone, by the names of their folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--collect", action="store_true", help="gather what is finished")
    options = parser.parse_args()
    study = read(options.study)
    place = Place(options.material.resolve(), options.jobs, 1, options.threads)
    wanted = [cell for cell in cells(study) if cell.folder in (options.cells or [cell.folder])]
    failed = run_cells(study, [] if options.collect else wanted, place, lambda: None)
    results = collect(study)
    publish_text(Path(study.results), as_json(results))
    print(as_text(results))
    tell_failures(failed)


if __name__ == "__main__":
    main()
