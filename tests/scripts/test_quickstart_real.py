"""`quickstart.sh --real`: a small pool that keeps its planted faults, a forecast, and advice that
follows from the intervals.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from conftest import REPO
from grads_ds.config.load import load_config
from grads_ds.report.outcome import Difference, Measure, Model, Outcome
from scripts.quickstart import corpus, real_eta, real_pool, real_verdict


def chats(count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(f"What does f{i} do?", f"It does number {i}.") for i in range(start, start + count)]


def test_the_small_pool_keeps_every_kind_and_the_twins_of_what_repeats() -> None:
    import random

    rows = corpus.domain_pool(chats(1400), chats(300, 5000), random.Random(0))
    pool = real_pool.small_pool(rows)
    kinds = Counter(row["kind"] for row in pool)
    assert kinds == dict.fromkeys(real_pool.KINDS, real_pool.BAD) | {"good": real_pool.GOOD}
    good = {real_pool.answer(row) for row in pool if row["kind"] == "good"}
    repeated = {real_pool.answer(row) for row in pool if row["kind"] == "near_duplicate"}
    assert repeated <= good
    assert [row for row in rows if row in pool] == pool  # in the order given


def test_the_forecast_grows_with_the_work_and_stays_below_half_an_hour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPO)
    config = load_config("configs/quickstart_real.yaml")
    # 240 rows and 96 held-out ones of 100 tokens, at the 250 tokens a second of two idle cores
    usual = real_eta.minutes(config, 1 / 250, 24_000, 9_600)
    assert set(usual) == {"probe", "sft", "evaluate"} and sum(usual.values()) < 30
    assert sum(real_eta.minutes(config, 1 / 125, 24_000, 9_600).values()) > sum(usual.values())


def outcome(value: float, low: float, high: float) -> Outcome:
    gap = Difference(value, (low, high))
    measures = {"domain": Measure(2.0, 7.4, None, gap, gap)}
    model = Model("selected", "guided", 0.25, 60, measures, ["random"])
    return Outcome([model], ["domain"], ["domain"], [], True)


@pytest.mark.parametrize(
    ("gap", "kept", "words"),
    [
        ((-0.1, -0.2, -0.05), 2, "Use this selection"),
        ((0.1, 0.05, 0.2), 2, "Do not use this selection"),
        ((0.0, -0.1, 0.1), 2, "the cleaner one"),
        ((0.0, -0.1, 0.1), 40, "Random rows do as well"),
    ],
)
def test_the_advice_follows_from_the_intervals(
    gap: tuple[float, float, float], kept: int, words: str
) -> None:
    found = {
        "selected": Counter(good=60 - kept, wrong_answer=kept),
        "random": Counter(good=40, wrong_answer=20),
    }
    said = real_verdict.advice(found, outcome(*gap))
    assert f"chosen rows: {kept}; among as many random rows: 20" in said[0]
    assert words in said[1] and "another (--set seed=1)" in said[2]


def test_the_kinds_are_counted_in_pool_selection_and_random_rows(tmp_path: Path) -> None:
    kinds = ["good", "good", "trivial", "off_domain"]
    rows: dict[str, Any] = {
        "sample_id": [0, 1, 2, 3],
        "metadata": [json.dumps({"kind": kind}) for kind in kinds],
    }
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "prepared/pool"))
    for folder, chosen in (
        ("selection", [1, 1, 0, 0]),
        ("selection/variants/random", [0, 1, 1, 0]),
    ):
        (tmp_path / folder).mkdir(parents=True)
        table = pa.table({"sample_id": [0, 1, 2, 3], "selected": [bool(c) for c in chosen]})
        pq.write_table(table, tmp_path / folder / "selection.parquet")
    found = real_verdict.kept_by_kind(tmp_path)
    assert found["selected"] == {"good": 2} and found["random"] == {"good": 1, "trivial": 1}
    assert "wrong answer" in real_verdict.as_table(found).splitlines()[0]


@pytest.mark.parametrize("real", [False, True])
def test_the_script_takes_each_road_in_order_and_says_what_it_shows(
    tmp_path: Path, real: bool
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(REPO / "scripts/quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts/install.sh").write_text("echo installed\n")
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/usr/bin/env bash\necho "ran $*"\n{shlex.quote(sys.executable)} -c ""\n')
    python.chmod(0o755)
    command = ["bash", str(tmp_path / "scripts/quickstart.sh"), *(["--real"] if real else [])]
    done = subprocess.run(
        [*command, "--set", "seed=1"], capture_output=True, text=True, timeout=60, check=True
    )
    ran = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran scripts")]
    names = [name.removeprefix("scripts/quickstart/").removesuffix(".py") for name in ran]
    if real:
        assert names == ["real_model", "corpus", "real_pool", "real_eta", "real_verdict"]
        assert "ran -m grads_ds run configs/quickstart_real.yaml --set seed=1" in done.stdout
    else:
        assert names == ["corpus", "base_model"]
        assert "ran -m grads_ds run configs/quickstart.yaml --set seed=1" in done.stdout
        assert "What it cannot show" in done.stdout
        assert "bash scripts/quickstart.sh --real" in done.stdout
