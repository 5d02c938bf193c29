"""The study of levers: excess is over plain's random line on the same rows, promises are counted on
the audit half, and means are over pools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from conftest import REPO
from grads_ds.evaluate.best import choice_record
from grads_ds.evaluate.candidates import read_candidates
from grads_ds.evaluate.forgetting_limit import choose
from grads_ds.evaluate.row_files import OWN, rows_file
from grads_ds.statistics import bootstrap_interval
from scripts.study.design import Cell, cells, read
from scripts.study.lever_pages import complete
from scripts.study.lever_tables import as_text, pooled, promises
from scripts.study.levers import LIMITS, as_json, collect, run_numbers
from tests.report.synthetic_forgetting import LINE, write_forgetting

MAIN = "guided_25"
SETTINGS = {
    "seed": 0,
    "evaluate": {"bootstrap": 200, "max_forgetting": 0.05, "forgetting": "kl", "retention": {}},
}
OTHER = {
    "selected": ("guided", 3000, 0.24, 0.040),  # the line is at 0.055 there
    "random_25": ("random", 3000, 0.31, 0.120),  # at 0.090
    "full": ("full", 12000, 0.50, 0.200),  # beyond it
}
BETWEEN = {"selected@0.5": ("selected", 0.5, None, 0.11, 0.010)}  # at 0.020


def write_run(run: Path, models: dict[str, Any], between: dict[str, Any] | None = None) -> Path:
    """A finished run: its rows, its settings and what the limit chose."""
    run.mkdir(parents=True)
    evaluation = write_forgetting(run, models, between)
    base = run / rows_file("base", "domain")
    table = pq.read_table(base)
    losses = pa.array([[0.5, 2.5]] * table.num_rows, pa.list_(pa.float32()))
    pq.write_table(table.append_column("token_losses", losses), base, write_page_checksum=True)
    (run / "resolved.yaml").write_text(yaml.safe_dump(SETTINGS))
    found = read_candidates(evaluation, run, "kl")
    assert found is not None
    (run / "best").mkdir()
    choice = choice_record(found, choose(found.models, 0.05, 200, 0))
    (run / "best/choice.json").write_text(json.dumps(choice))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the run with random's line, another footing's)."""
    seed = read(REPO / "configs/study/forgetting.yaml").seeds[0]
    folder = tmp_path_factory.mktemp("levers") / "study" / Cell("medicine", 0.4, seed).folder
    plain = {"selected": ("guided", 3000, 0.24, 0.055), **LINE}
    return write_run(folder / "plain", plain), write_run(folder / "stm", OTHER, BETWEEN)


@pytest.fixture(scope="module")
def numbers(runs: tuple[Path, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of both."""
    plain, other = runs
    return run_numbers(plain, plain, MAIN), run_numbers(other, plain, MAIN)


def test_excess_is_over_plains_line_at_the_same_gain_on_every_measure(
    numbers: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    models = numbers[1]["models"]
    assert list(models) == [MAIN, "random_25", "full", f"{MAIN}@0.5"]
    for measure in ("kl", "own_loss", "loss"):
        wanted = {MAIN: -0.015, "random_25": 0.030, f"{MAIN}@0.5": -0.010}
        for name, excess in wanted.items():
            value, low, high = models[name][f"{measure}_excess"]
            assert value == pytest.approx(excess, abs=2e-3) and low <= value <= high
            assert (high < 0) == (excess < 0)
        assert models["full"][f"{measure}_excess"] == [None, None, None]
    own = numbers[0]["models"]
    assert own[MAIN]["kl_excess"][0] == pytest.approx(0, abs=2e-3)
    assert {name for name in own if own[name].get("on_line")} == set(LINE)


def test_gain_and_divergence_are_the_weighted_means_of_the_rows(
    runs: tuple[Path, Path], numbers: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    other, found = runs[1], numbers[1]["models"][MAIN]
    own = pq.read_table(other / rows_file("selected", OWN)).to_pydict()
    tokens = np.array(own["kl_positions"], float)
    values = np.array(own["kl_sum"]) / tokens
    assert found["kl"][0] == pytest.approx(np.sum(own["kl_sum"]) / tokens.sum(), abs=1e-4)
    assert found["kl"][1:] == pytest.approx(bootstrap_interval(values, 200, 0, tokens), abs=1e-4)
    assert found["gain"][0] == pytest.approx(0.24, abs=1e-3)


def test_the_choice_is_told_with_its_audit_and_its_excess_there(
    runs: tuple[Path, Path], numbers: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    other, best = runs[1], numbers[1]["best"]
    assert (best["chosen"], best["kept"], best["unlimited"]) == (MAIN, True, "full")
    choice = json.loads((other / "best/choice.json").read_text())
    assert best["audit"][0] == round(choice["audit"]["forgetting"], 4)
    assert best["audit_rows"] == choice["audit"]["rows"] > 0
    assert best["audit_excess"][2] < 0
    own = numbers[0]
    assert own["best"]["chosen"] in LINE and own["best"]["audit_excess"] == [0.0, 0.0, 0.0]
    assert "nothing fits" not in str(own["verdict"]).lower() and own["verdict"]


def test_models_that_were_measured_on_other_rows_are_refused(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "run", OTHER)
    for name in ("base", *OTHER):  # another answer is one token longer
        file = other / rows_file(name, OWN)
        table = pq.read_table(file)
        counts = table["kl_positions"].to_numpy().copy()
        counts[3] += 1
        place = table.column_names.index("kl_positions")
        table = table.set_column(place, "kl_positions", [counts])
        pq.write_table(table, file, write_page_checksum=True)
    with pytest.raises(ValueError, match="measured on other rows"):
        run_numbers(other, runs[0], MAIN)


def test_finished_runs_alone_are_gathered_and_tell_their_tables(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    study = read(REPO / "configs/study/forgetting.yaml")
    study = study.model_copy(update={"out": str(runs[0].parents[1])})
    found = collect(study)
    assert [(r["domain"], r["role"], r["footing"]) for r in found["runs"]] == [
        ("medicine", "choose", "plain"),
        ("medicine", "choose", "stm"),
    ]
    assert len(list(cells(study))) == 9
    levers = found["pooled"]["levers"]
    assert levers["stm"][MAIN]["kl_excess"][1:] == [None, None, 1]  # one pool has no interval
    text = as_text(found)
    assert f"best/model: {MAIN}" in text and f"{MAIN}@0.5" in text
    written = as_json(found)
    assert json.loads(written) == json.loads(json.dumps(found))
    assert any('"gain"' in line and '"loss_excess"' in line for line in written.splitlines())


def run_of(
    footing: str, kept: bool | None, excess: float | None, kl: float, seed: int = 0
) -> dict[str, Any]:
    best: dict[str, Any] = {"chosen": None, "limit": 0.05}
    if kept is not None:
        best |= {"chosen": "m", "kept": kept, "gain": 0.1, "audit": [kl], "cost_in_gain": [0.0]}
        best |= {"audit_excess": [excess], "kind": "interpolation"}
    models = {"m": {"gain": [0.1], "kl": [kl], "kl_excess": [excess]}}
    pool = {"domain": "law", "noise": 0.4, "seed": seed, "role": "choose"}
    return {**pool, "footing": footing, "best": best, "sweep": [best], "models": models}


def test_promises_are_counted_among_runs_that_publish_with_the_exact_interval() -> None:
    runs = [run_of("a", True, -0.01, 0.02)] * 7 + [run_of("a", False, 0.0, 0.06)]
    found = promises([*runs, run_of("a", None, None, 0.3)])
    assert (found["runs"], found["published"], found["kept"]) == (9, 8, 7)
    share, low, high = found["share"]
    # Clopper-Pearson by its definition: beta quantiles
    assert share == 0.875
    assert low == pytest.approx(stats.beta.ppf(0.025, 7, 2), abs=1e-4)
    assert high == pytest.approx(stats.beta.ppf(0.975, 8, 1), abs=1e-4)
    assert promises([run_of("a", None, None, 0.3)]) == {"runs": 1, "published": 0}


def test_levers_are_pooled_over_pools_and_pools_without_a_line_are_counted_out() -> None:
    runs = [run_of("a", True, e, 0.02, n) for n, e in enumerate((-0.01, -0.03, None))]
    runs.append(run_of("b", True, 1, 1))
    found = pooled(runs)
    entry = found["levers"]["a"]["m"]
    assert entry["pools"] == 3 and entry["kl"][3] == 3
    mean, low, high, having = entry["kl_excess"]
    half = stats.t.ppf(0.975, 1) * np.std([-0.01, -0.03], ddof=1) / np.sqrt(2)
    assert (mean, having) == (-0.02, 2)
    assert (low, high) == pytest.approx((-0.02 - half, -0.02 + half), abs=1e-4)
    assert found["best"]["all"]["runs"] == 4 and found["best"]["b"]["audit_excess"][0] == 1


def test_runs_of_one_pool_count_once_in_the_means_of_what_was_published() -> None:
    runs = [run_of(footing, True, e, 0.02) for footing, e in (("a", -0.01), ("b", -0.03))]
    found = promises([*runs, run_of("a", True, -0.06, 0.02, seed=1)])
    assert (found["kept"], found["kinds"]) == (3, {"interpolation": 3})
    assert found["audit_excess"][0] == pytest.approx(-0.04) and found["audit_excess"][3] == 2


def test_a_limit_of_the_sweep_chooses_as_the_run_itself_would(
    runs: tuple[Path, Path], numbers: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    for found in numbers:
        assert [best["limit"] for best in found["sweep"]] == list(LIMITS)
        assert found["sweep"][LIMITS.index(0.05)] == found["best"]
        gains = [best["gain"] for best in found["sweep"] if best["chosen"] is not None]
        assert gains == sorted(gains) and len(gains) >= 2
    assert numbers[1]["sweep"][-1]["chosen"] == "full"  # at 0.3 everything is let through
    assert numbers[1]["sweep"][-1]["audit_excess"] == [None, None, None]  # it is beyond the line
    found = pooled([run_of("plain", None, None, 0.3), run_of("stm", False, 0.1, 0.06)])["sweep"]
    assert list(found) == ["all", "plain", "plain, choose"]
    assert (found["all"][0]["runs"], found["all"][0]["published"]) == (2, 1)
    assert (found["all"][0]["limit"], found["all"][0]["kept"]) == (0.05, 0)
    assert found["plain"] == [{"limit": 0.05, "runs": 1, "published": 0}]


def test_promises_of_all_limits_are_counted_by_choice_and_by_pool() -> None:
    runs = [run_of("a", True, 0.0, 0.02, seed) for seed in (0, 1)]
    runs += [run_of("b", False, 0.0, 0.06, 1), run_of("b", None, None, 0.3, 2)]
    found = pooled(runs)["kept"]
    assert (found["published"][:2], found["pools"][:2]) == ([2, 3], [1, 2])
    assert found["pools"][3:] == pytest.approx(
        [stats.beta.ppf(0.025, 1, 2), stats.beta.ppf(0.975, 2, 1)], abs=1e-4
    )


def test_what_a_gate_leaves_out_is_told_in_tokens_and_in_loss(
    numbers: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    # of every row's losses 0.5 and 2.5 the gate of stm leaves the second out
    assert numbers[0]["stm"] == {"tokens": 0.5, "loss": 0.8333}


def test_levers_are_compared_on_the_pools_that_all_were_run_on() -> None:
    runs = [run_of(f, True, 0.0, 0.1, seed) for seed in (0, 1) for f in ("a", "b")]
    assert complete([*runs, run_of("a", True, 0.0, 0.1, 2)]) == runs
