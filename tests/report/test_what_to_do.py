"""What to do, in plain words: each verdict follows from numbers that are made for it; the picture
holds every model; the page and the terminal say it first.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grads_ds.evaluate.best import choice_record
from grads_ds.evaluate.candidates import read_candidates
from grads_ds.evaluate.forgetting_limit import choose
from grads_ds.report.forgetting import Forgetting, read_forgetting
from grads_ds.report.forgetting_figure import picture
from grads_ds.report.text_table import report_table
from grads_ds.report.what_to_do import Advice, advice
from tests.report.html_page import Page, report
from tests.report.synthetic_forgetting import LINE, write_forgetting
from tests.report.synthetic_run import make_run

Models = dict[str, tuple[str, int, float, float]]


def found_in(
    folder: Path, models: Models, limit: float | None = None, between: dict[str, Any] | None = None
) -> Forgetting:
    evaluation = write_forgetting(folder, models, between)
    config: dict[str, Any] = {"evaluate": {"bootstrap": 200}}
    if limit is not None:
        config["evaluate"] |= {"max_forgetting": limit, "forgetting": "kl"}
        candidates = read_candidates(evaluation, folder, "kl")
        assert candidates is not None
        choice = choose(candidates.models, limit, 200, 0)
        (folder / "best").mkdir(exist_ok=True)
        (folder / "best/choice.json").write_text(json.dumps(choice_record(candidates, choice)))
    found = read_forgetting(folder, evaluation, config)
    assert found is not None
    return found


def advised(folder: Path, selected: tuple[float, float], **changes: Any) -> Advice:
    models = {"selected": ("grads", 3000, *selected)} | LINE | changes.pop("more", {})
    return advice(found_in(folder, models, **changes))


@pytest.mark.parametrize(
    ("selected", "headline", "reason"),
    [
        # far below random's line at its gain
        ((0.24, 0.010), "Train on this subset.", "forgets less than random rows: -0.04"),
        # on the line, no more gain than random rows of its number
        ((0.24, 0.055), "A random quarter is as good.", "+0.0000 (95 % interval"),
        # above the line, at less gain
        ((0.20, 0.080), "A random quarter is as good.", "forgets more than random rows"),
        # the pool gains more and forgets no more
        ((0.20, 0.160), "Train on all of it.", "Against the subset: gain +0.16"),
    ],
)
def test_the_advice_follows_from_the_numbers(
    tmp_path: Path, selected: tuple[float, float], headline: str, reason: str
) -> None:
    found = advised(tmp_path, selected)
    assert found.headline == headline
    assert any(reason in text for text in found.reasons), found.reasons


def test_a_snapshot_that_gains_as_much_and_forgets_less_says_stop_earlier(tmp_path: Path) -> None:
    between = {"selected~0.5": ("selected", None, 0.5, 0.24, 0.02)}
    found = advised(tmp_path, (0.24, 0.055), between=between)
    assert found.headline == "Stop earlier: selected~0.5."
    worse = {"selected~0.5": ("selected", None, 0.5, 0.10, 0.01)}
    assert "earlier" not in advised(tmp_path, (0.24, 0.055), between=worse).headline


def test_nothing_learned_and_no_random_subset_are_said(tmp_path: Path) -> None:
    idle = advice(found_in(tmp_path, {"selected": ("grads", 3000, -0.1, 0.01)}))
    assert idle.headline == "Train on none of it."
    alone = advice(found_in(tmp_path, {"selected": ("grads", 3000, 0.1, 0.01)}))
    assert "no random subset of its size tells" in alone.headline


def test_a_limit_chooses_says_its_cost_and_what_it_audited(tmp_path: Path) -> None:
    found = advised(tmp_path, (0.30, 0.050), limit=0.06)
    assert found.headline == "Train on this subset: selected." and found.tone == "good"
    told = " ".join(found.reasons)
    assert "stays within 0.06 nats: 0.0" in told and "published as best/model" in told
    assert "took no part in the choice" in told and "the promise holds there" in told
    assert re.search(r"The limit costs 0\.06\d\d nats of gain .* full gains \+0\.36", told)
    half = {"selected@0.5": ("selected", 0.5, None, 0.27, 0.02)}
    part = advised(tmp_path, (0.30, 0.050), limit=0.03, between=half)
    assert part.headline.startswith("Go part of the way: selected@0.5, a merge")
    everything = advised(tmp_path, (0.30, 0.050), limit=1.0)
    assert everything.headline == "Train on all of it."
    assert "The limit costs nothing: no model gains more." in everything.reasons
    random = advised(tmp_path, (0.10, 0.050), limit=0.06)
    assert random.headline == "Train on a random quarter."


def test_nothing_fits_is_said_with_what_comes_nearest(tmp_path: Path) -> None:
    found = advised(tmp_path, (0.30, 0.050), limit=0.001)
    assert found.headline == "Nothing fits: no model is published." and found.tone == "bad"
    assert "Nearest is frontier-0.05: 0.0" in found.reasons[0]


def test_the_picture_holds_every_model_the_line_the_merges_and_the_limit(tmp_path: Path) -> None:
    between = {
        "selected@0.5": ("selected", 0.5, None, 0.27, 0.02),
        "selected~0.5": ("selected", None, 0.5, 0.25, 0.03),
    }
    models = {"selected": ("grads", 3000, 0.30, 0.05)} | LINE
    drawing = str(picture(found_in(tmp_path, models, 0.06, between)))
    for name in [*models, *between]:
        assert f"<title>{name}: gain" in drawing
    for mark in ('class="frontier"', 'class="between"', 'class="limit"', 'class="ring"'):
        assert drawing.count(mark) >= 1
    plain = str(picture(found_in(tmp_path, {"selected": ("grads", 3000, 0.30, 0.05)})))
    assert 'class="frontier"' not in plain and 'class="limit"' not in plain


def names_of(drawing: str) -> list[tuple[float, float, float, float]]:
    """Boxes of the names, at 7.4 pixels a letter."""
    boxes = []
    pattern = r'<text class="name[^"]*" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)<'
    for x, y, anchor, text in re.findall(pattern, drawing):
        width = 7.4 * len(text)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 12, left + width, float(y) + 3))
    return boxes


def test_names_do_not_lie_over_each_other_nor_leave_the_frame(tmp_path: Path) -> None:
    crowd = {f"variant-{n}": ("grads", 3000, 0.2 + 0.003 * n, 0.05) for n in range(12)}
    models = {"selected": ("grads", 3000, 0.21, 0.051)} | LINE | crowd
    boxes = names_of(str(picture(found_in(tmp_path, models))))
    assert len(boxes) > 4
    for number, one in enumerate(boxes):
        assert one[0] >= 0 and one[2] <= 680
        for other in boxes[number + 1 :]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("narrow", [False, True])
def test_the_selected_and_the_published_model_are_always_named(
    tmp_path: Path, narrow: bool
) -> None:
    crowd = {
        f"other-{n}": ("grads", 3000, 0.2 + 0.004 * n, 0.05 + 0.01 * (n % 3)) for n in range(12)
    }
    between = {"selected@0.5": ("selected", 0.5, None, 0.235, 0.03)}
    models = crowd | LINE | {"selected": ("grads", 3000, 0.22, 0.06)}
    drawing = str(picture(found_in(tmp_path, models, 0.035, between), narrow))
    assert 'class="name chosen"' in drawing and ">selected@0.5</text>" in drawing
    own = re.search(
        r'class="limit" x="([\d.]+)" y="([\d.]+)" text-anchor="end">limit 0.035<', drawing
    )
    assert own is not None
    right, at = float(own[1]), float(own[2])
    for box in names_of(drawing):  # no name lies over the limit's
        assert box[2] <= right - 80 or box[3] <= at - 10 or box[1] >= at + 3


def test_the_page_and_the_terminal_say_first_what_to_do(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=300, variants=False)
    run_dir = Path(config.run_dir)
    models = {"selected": ("grads", 3000, 0.24, 0.010)} | LINE
    write_forgetting(run_dir, models)
    page: Page = report(config)
    text = page.text["forgetting"]
    assert "Train on this subset." in text and "forgets less than random rows" in text
    assert "less random's" in text and "17.0 s beside 1.7 min" in text
    assert page.html.index('id="forgetting"') < page.html.index('id="verdict"')
    assert page.html.count("<figure class=") == page.html.count('<figure class="forgetting"')
    assert report_table(run_dir).startswith("Train on this subset.\n* selected, trained on 3,000")


def test_a_run_without_files_of_rows_keeps_its_page(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=300)
    page = report(config)
    assert "Gain and forgetting want a domain" in page.text["forgetting"]
    assert 'class="tradeoff"' in page.html
    table = report_table(Path(config.run_dir))
    assert table.startswith("model")
    assert yaml.safe_load((Path(config.run_dir) / "resolved.yaml").read_text())
