"""Several runs side by side: overlap by content, differences on the same rows; what does not
compare is said; the page is safe.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_ds.cli import main
from grads_ds.config.errors import UserError
from grads_ds.report.outcome import paired_interval
from grads_ds.report.run_comparison import compare_runs
from grads_ds.report.side_by_side import comparison_page, comparison_text
from grads_ds.run_dir.units import mark_done
from tests.report.html_page import Page
from tests.report.synthetic_run import make_run, write_json

N = 200


def record(folder: Path) -> None:
    """Record what lies in the run directory as what its units have written."""
    rows = ["domain.parquet"] * (folder / "domain.parquet").exists()
    selection = ["selection/selection.parquet", "selection/selection.json"]
    scores = mark_done(folder, "probe/record", {}, ["scores/table.parquet"], 37.5)
    chosen = mark_done(folder, "select/selected", {"probe": scores}, selection, 50.0)
    sft = {"selected": mark_done(folder, "sft/selected", {"select": chosen}, [], 62.5)}
    mark_done(folder, "evaluate", {"sft": sft}, ["evaluation.json", *rows], 0.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one pool; the second chose other rows and kept its losses row by row, as the
    first.
    """
    root = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, 80)
    folders = []
    for name, shift in (("one", 0.0), ("two", -0.1)):
        config = make_run(root / name, n=N, variants=False)
        folder = Path(config.run_dir)
        losses = 2.0 + shift + 0.1 * rng.random(80)
        pq.write_table(
            pa.table({"loss": losses, "num_target_tokens": tokens}), folder / "domain.parquet"
        )
        value = json.loads((folder / "evaluation.json").read_text())
        value["models"]["selected"]["domain"] |= {
            "loss": float(np.average(losses, weights=tokens)),
            "sample_losses_file": "domain.parquet",
        }
        write_json(folder / "evaluation.json", value)
        folders.append(folder)
    path = folders[1] / "selection/selection.parquet"
    table = pq.read_table(path).to_pandas()
    table["selected"] = np.roll(table.selected, 3)
    pq.write_table(pa.Table.from_pandas(table), path)
    for folder in folders:
        record(folder)
    return folders


def test_overlap_is_that_of_the_rows_chosen_whatever_their_ids(pair: list[Path]) -> None:
    found = compare_runs(pair)
    chosen = [
        set(np.flatnonzero(pq.read_table(f / "selection/selection.parquet")["selected"].to_numpy()))
        for f in pair
    ]
    share = len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])
    assert found.overlap == [[1.0, share], [share, 1.0]] and share < 1
    scores = pair[1] / "scores/table.parquet"
    before = scores.read_bytes()
    table = pq.read_table(scores).to_pandas()
    table["sample_hash"] = [f"other {i}" for i in range(N)]
    pq.write_table(pa.Table.from_pandas(table), scores)
    record(pair[1])
    assert compare_runs(pair).overlap[0][1] == 0.0
    scores.write_bytes(before)
    record(pair[1])


def test_the_difference_between_two_runs_has_a_paired_interval(pair: list[Path]) -> None:
    own, first = (pq.read_table(folder / "domain.parquet").to_pandas() for folder in pair[::-1])
    gap = compare_runs(pair).losses["domain"][1].to_first  # type: ignore[union-attr]
    assert gap is not None and gap.interval is not None
    tokens = own.num_target_tokens.to_numpy()
    wanted = paired_interval(own.loss.to_numpy(), [first.loss.to_numpy()], tokens)
    assert gap.interval == wanted and wanted[1] < 0 and gap.tone == "good"
    assert compare_runs(pair).losses["domain"][0].to_first is None  # type: ignore[union-attr]


def test_the_text_and_the_page_hold_the_same_numbers(pair: list[Path]) -> None:
    found = compare_runs(pair)
    text, page = comparison_text(found), Page(comparison_page(found))
    assert "one/run" in text and "two/run" in text
    seen = " ".join(page.text.values())
    for words in ("rows shared with one/run", "less base", "less one/run", "forgetting", "3.1 min"):
        assert words in text and words in seen
    assert not [tag for tag, _ in page.elements if tag in ("script", "img", "link")]


def test_what_is_kept_of_the_base_is_shown_where_it_was_measured(pair: list[Path]) -> None:
    path = pair[0] / "evaluation.json"
    before = path.read_text()
    kept = {"value": 0.25, "ci95": [0.2, 0.3], "targets": 7}
    models = {
        "base": {"own_answers": {"loss": 1.0}, "kl": {}},
        "selected": {"own_answers": {"loss": 1.5}, "kl": {"general": kept}},
    }
    write_json(path, json.loads(before) | {"retention": {"models": models}})
    record(pair[0])
    text = comparison_text(compare_runs(pair))
    path.write_text(before)
    record(pair[0])
    assert re.search(r"divergence from base on general +0.2500 \(0.2000–0.3000\) +–", text)
    assert re.search(r"own answers less base +\+0.5000 +–", text)
    assert "kept of the base" not in comparison_text(compare_runs(pair))


def test_what_does_not_compare_is_said(pair: list[Path], tmp_path: Path) -> None:
    config = make_run(tmp_path / "other", n=N, variants=False)
    folder = Path(config.run_dir)
    tree = (folder / "resolved.yaml").read_text().partition("\n")[2]
    (folder / "resolved.yaml").unlink()
    record(folder)
    (folder / "resolved.yaml").write_text(tree.replace("models/base-8M", "models/<b>70B"))
    with pytest.raises(UserError, match="altered"):
        compare_runs([pair[0], folder])  # its digest is not there
    import hashlib

    changed = tree.replace("models/base-8M", "models/<b>70B")
    digest = hashlib.sha256(changed.encode()).hexdigest()
    (folder / "resolved.yaml").write_text(f"# sha256 of the lines below: {digest}\n{changed}")
    value = json.loads((folder / "evaluation.json").read_text())
    pq.write_table(pa.table({"loss": [1.0], "num_target_tokens": [3]}), folder / "domain.parquet")
    value["models"]["selected"]["domain"]["sample_losses_file"] = "domain.parquet"
    write_json(folder / "evaluation.json", value)
    record(folder)
    found = compare_runs([pair[0], folder])
    said = " ".join(found.warnings)
    assert "different models" in said and "domain does not have the same rows" in said
    assert found.differing["model.path"] == ["models/base-8M", "models/<b>70B"]
    assert found.losses["domain"][1].to_first is None  # type: ignore[union-attr]
    page = comparison_page(found)
    assert "models/&lt;b&gt;70B" in page and "<b>70B" not in page


def copy_evaluation(one: Path, two: Path) -> None:
    shutil.copy(one / "evaluation.json", two)


def copy_with_its_record(one: Path, two: Path) -> None:
    copy_evaluation(one, two)
    shutil.copy(one / "state/evaluate.json", two / "state")


def select_again(one: Path, two: Path) -> None:
    outputs = ["selection/selection.parquet", "selection/selection.json"]
    mark_done(two, "select/selected", {}, outputs, 0.0)


FOREIGN = {
    "another run's evaluation": (copy_evaluation, "evaluation.json was altered"),
    "the same, in a run without one": (
        lambda one, two: (copy_evaluation(one, two), (two / "state/evaluate.json").unlink()),
        "evaluation.json, which no unit of this run has recorded",
    ),
    "with its record": (
        copy_with_its_record,
        "evaluation.json, made with another sft.selected than this run has now",
    ),
    "an evaluation of an earlier selection": (
        lambda one, two: (select_again(one, two), mark_done(two, "sft/selected", {}, [], 0.0)),
        "made with another sft.selected",
    ),
    "another run's scores": (
        lambda one, two: shutil.copy(one / "scores/table.parquet", two / "scores"),
        "scores/table.parquet was altered",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_results_that_are_not_the_runs_own_are_refused(
    case: str, pair: list[Path], tmp_path: Path
) -> None:
    change, said = FOREIGN[case]
    folders = [Path(shutil.copytree(f, tmp_path / f"{n}/run")) for n, f in enumerate(pair)]
    assert compare_runs(folders)
    other = Path(make_run(tmp_path / "other", n=N + 1, variants=False).run_dir)
    record(other)
    change(other, folders[1])
    with pytest.raises(UserError) as caught:
        compare_runs(folders)
    assert f"{folders[1]}: wanted the run's own results; found " in str(caught.value)
    assert said in str(caught.value)


def test_every_problem_of_the_runs_is_listed_at_once(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none"
    assert main(["compare", str(pair[0]), str(pair[0]), str(missing)]) == 2
    said = capsys.readouterr().err
    assert "2 problems" in said and "each once" in said and str(missing) in said


def test_the_command_prints_and_writes_the_page(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.html"
    assert main(["compare", *map(str, pair), "--html", str(out)]) == 0
    assert "rows shared with two/run" in capsys.readouterr().out
    assert out.read_text().startswith("<!DOCTYPE html>")
