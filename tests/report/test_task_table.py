"""The page shows what was learned against what was forgotten, and every task's scores for every
model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from grads_ds.report.outcome import outcome_of
from grads_ds.report.stage import run_report
from grads_ds.report.task_table import task_rows, tradeoff
from tests.report.synthetic_run import make_run, write_json
from tests.report.test_outcome import HERE, evaluated

TASKS = {
    "base": {
        "questions": {
            "kind": "multiple_choice",
            "accuracy": 0.25,
            "accuracy_ci95": [0.125, 0.375],
            "accuracy_by_characters": 0.3125,
            "num_samples": 16,
        },
        "lm_eval/local": {
            "kind": "lm_eval",
            "acc,none": 0.5,
            "acc_stderr,none": 0.0625,
            "sample_len": 16,
        },
    },
    "selected": {"questions": {"kind": "multiple_choice", "accuracy": 0.75, "num_samples": 16}},
}


def places(drawing: str) -> dict[str, tuple[float, float]]:
    points = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4.5"><title>([^:]+):', drawing)
    return {name: (float(x), float(y)) for x, y, name in points}


def test_more_learned_is_lower_and_more_forgotten_is_further_right() -> None:
    drawing = tradeoff(
        outcome_of(
            evaluated(base=(4.0, 3.0), full=(3.0, 3.5), selected=(3.2, 3.1), random=(3.6, 2.9)),
            HERE,
        )
    )
    assert drawing is not None
    found = places(drawing)
    assert set(found) == {"full", "selected", "random"}  # the base model is the origin
    assert found["random"][0] < found["selected"][0] < found["full"][0]
    assert found["random"][1] < found["selected"][1] < found["full"][1]  # pixels grow downwards


def test_without_a_general_set_or_a_base_model_there_is_nothing_to_weigh() -> None:
    assert tradeoff(outcome_of(evaluated(full=(3.0, 3.5), selected=(3.2, 3.1)), HERE)) is None
    alone = evaluated(base=(4.0, 3.0), selected=(3.2, 3.1))
    for model in alone["models"].values():
        del model["general"]
    assert tradeoff(outcome_of(alone, HERE)) is None


def test_each_score_of_a_task_is_a_row_with_its_interval_or_error() -> None:
    rows = {(row.task, row.measure): row.scores for row in task_rows({"tasks": TASKS})}
    assert rows == {
        ("questions", "accuracy"): {"base": (0.25, "0.125–0.375"), "selected": (0.75, "")},
        ("questions", "accuracy_by_characters"): {"base": (0.3125, "")},
        ("lm_eval/local", "acc,none"): {"base": (0.5, "± 0.062")},
    }
    assert task_rows(None) == task_rows({"models": {}}) == []


def test_the_page_holds_the_figure_and_the_tasks(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    run = Path(config.run_dir)
    found = json.loads((run / "evaluation.json").read_text())
    write_json(run / "evaluation.json", found | {"tasks": TASKS})
    run_report(config, run)
    page = (run / "report.html").read_text()
    figure = page.partition('<figure class="tradeoff">')[2].partition("</figure>")[0]
    assert set(places(figure)) == set(found["models"]) - {"base"}
    table = page.partition('class="wide tasks"')[2].partition("</table>")[0]
    assert "lm_eval/local" in table and "0.7500" in table and "0.125–0.375" in table
