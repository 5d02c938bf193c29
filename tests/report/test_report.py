"""The page: complete, true to its inputs, safe with hostile rows, self-contained, small; and the
plain-text table.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grads_ds.config.config import Config
from grads_ds.run_dir.provenance import resolved_text
from tests.report.html_page import SECTIONS, Page, block, report
from tests.report.synthetic_run import LOSSES, make_run, write_json


def test_every_section_is_there_and_says_how_to_read_it(run: tuple[Config, Page]) -> None:
    page = run[1]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert ids == SECTIONS
    links = [str(attrs["href"])[1:] for tag, attrs in page.elements if tag == "a"]
    assert set(links) <= set(ids)
    for part in re.findall(r"<section.*?</section>", page.html, re.S):
        assert '<p class="how">' in part
    # losses, trade-off, signal, its variants, length, curves
    assert sum(tag == "svg" for tag, _ in page.elements) == 2 + 1 + 1 + 3 + 2 + 2


def test_evaluation_numbers_are_the_inputs(run: tuple[Config, Page]) -> None:
    text = run[1].text["evaluation"].replace("−", "-")
    for name, (domain, general) in LOSSES.items():
        row = text[text.index(f" {name} ") :]
        assert f"{domain:.4f}" in row and f"{general:.4f}" in row
        assert f"{np.exp(domain):.2f}" in row
        assert f"{domain - 0.04:.4f}–{domain + 0.05:.4f}" in row
        if name != "base":
            assert (
                f"{domain - LOSSES['base'][0]:+.4f}" in row
                and f"{general - LOSSES['base'][1]:+.4f}" in row
            )
    for name, random in {"selected": "random_5", "grads_50": "random_50"}.items():
        row = text[text.index(f" {name} ") :]
        assert f"{LOSSES[name][0] - LOSSES[random][0]:+.4f}" in row
        assert f"{LOSSES[name][1] - LOSSES[random][1]:+.4f}" in row


def test_headline_names_pool_subset_and_model(run: tuple[Config, Page]) -> None:
    text = run[1].text["headline"]
    assert "models/base-8M" in text and "grads selection of 60 from 1,200 samples" in text
    assert "1,197 scored" in text and "5.0 % of the pool" in text


def test_verdict_covers_every_subset_that_has_a_random_twin(run: tuple[Config, Page]) -> None:
    text = run[1].text["verdict"]
    assert (
        "A random subset of the same size reaches 2.8931: selection beat random by 0.0806" in text
    )
    assert "grads_50 (600 samples) beat random of its size: -0.0107" in text
    assert "random_50 (" not in text


def test_composition_counts_and_lift_are_the_selections(run: tuple[Config, Page]) -> None:
    config, page = run
    folder = Path(config.run_dir) / "selection"
    chosen = pq.read_table(
        folder / "selection.parquet", columns=["sample_id", "selected"]
    ).to_pandas()
    table = (
        pq.read_table(Path(config.run_dir) / "scores/table.parquet")
        .to_pandas()
        .sort_values("sample_id")
    )
    text = page.text["composition"]
    wiki = int(chosen.selected[chosen.sample_id % 4 == 0].sum())
    assert f"wiki.jsonl 300 25.0 % {wiki} {wiki / 60 / 0.25:.2f} " in text
    near = int(chosen.selected[chosen.sample_id % 6 == 4].sum())
    assert f"near_duplicate 200 16.7 % {near} {near / 60 / (1 / 6):.2f} " in text
    ok = (table.status == "ok").to_numpy()
    lengths = table.num_target_tokens.to_numpy()[ok]
    top = int(np.quantile(lengths, 0.25, method="inverted_cdf"))
    shortest = lengths <= top
    mine = int(chosen.selected.to_numpy()[ok][shortest].sum())
    lift = mine / 60 / (shortest.sum() / ok.sum())
    share = 100 * shortest.sum() / ok.sum()
    assert (
        f"{lengths.min()} to {top} tokens {shortest.sum()} {share:.1f} % {mine} {lift:.2f} " in text
    )


def test_methods_show_overlap_and_what_each_keeps_of_each_kind(run: tuple[Config, Page]) -> None:
    text = run[1].text["methods"]
    assert "budget 5.0 % budget 50.0 %" in text
    assert "method overlap clean off_domain overlap clean off_domain" in text
    # 60 of 1,200 samples are selected: overlaps of 60 and 3, then 60 and 31
    assert "grads density 100 % 8.0 % 0 % 100 % 61.0 % 12.5 %" in text
    assert "random 5.0 % 5.0 % 5.0 % 51.7 % 50.0 % 49.0 %" in text
    assert "not run: 1 ifd: select: wanted column ifd" in text


def test_norms_and_rank_correlations_are_those_of_the_scored_samples(
    run: tuple[Config, Page],
) -> None:
    from scipy.stats import spearmanr

    config, page = run
    table = pq.read_table(Path(config.run_dir) / "scores/table.parquet").to_pandas()
    table = table[table.status == "ok"]
    quantiles = np.quantile(
        table.embedding_grad_norm.astype(float), [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    )
    assert "embedding norm 1,197 " + " ".join(f"{q:.4g}" for q in quantiles) in page.text["norms"]
    assert (
        "ok 1,197 , no_target 3" in page.text["norms"]
        or "ok 1,197, no_target 3" in page.text["norms"]
    )
    for group in ("embedding", "lm_head"):
        rho = spearmanr(table.num_target_tokens, table[f"{group}_grad_norm"]).statistic
        assert f"{group} norm {rho:+.3f}".replace("-", "−") in page.text["length"]


def test_samples_are_the_extremes_of_the_signal_with_their_text(run: tuple[Config, Page]) -> None:
    config, page = run
    table = (
        pq.read_table(Path(config.run_dir) / "selection/selection.parquet")
        .to_pandas()
        .dropna(subset="signal")
    )
    order = table.sort_values("signal").sample_id.tolist()
    first = table.sort_values("rank").sample_id.tolist()[:5]
    shown = [int(i) for i in re.findall(r"sample (\d+) (?:not )?selected", page.text["samples"])]
    assert shown == order[::-1][:5] + order[:5] + first
    for i in shown:
        assert f"Question {i}:" in page.text["samples"] and f"Answer {i}." in page.text["samples"]
    parts = [len(part) for part in re.findall(r"<dd dir=\"auto\">(.*?)</dd>", page.html, re.S)]
    assert max(parts) < 900 and "…" in page.text["samples"]


def test_hostile_rows_stay_text(run: tuple[Config, Page]) -> None:
    page = run[1]
    assert '<script>alert("x")</script>' in page.text["samples"]  # shown as it stands
    assert not [
        tag
        for tag, _ in page.elements
        if tag in ("img", "iframe", "object", "embed", "base", "form")
    ]
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "class": "row-data"}, {}]  # data, and our own
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", page.html)


HOSTILE = "x\"'<img src=x onerror=alert(1)></script><script>1</script>\x1b]0;t\x07\x9b\u202e"


def renamed(value: Any) -> Any:
    """A JSON value with names of sets, methods, fields, kinds and sources that are hostile."""
    if isinstance(value, dict):
        return {renamed(key): renamed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item) for item in value]
    hostile = ("domain", "general", "grads", "kind", "clean", "wiki.jsonl", "prepare")
    return value + HOSTILE if value in hostile else value


def test_hostile_names_everywhere_stay_text(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=200)
    run = Path(config.run_dir)
    files = [*run.glob("*.json"), *run.glob("prepared/*.json"), *run.glob("state/*.json")]
    for file in [*files, *run.glob("selection/**/*.json")]:
        write_json(file, renamed(json.loads(file.read_text())))
    tree = config.model_dump(mode="json")
    tree["model"]["path"] = f"models/{HOSTILE}"
    tree["data"] |= {"train": [HOSTILE], "validation": {"domain" + HOSTILE: [HOSTILE]}}
    tree["provenance"] = {"python": HOSTILE, "packages": {HOSTILE: HOSTILE}}
    (run / "resolved.yaml").write_text(resolved_text(tree))
    page = report(config)
    for place in ("headline", "evaluation", "composition", "settings"):
        assert "<img src=x onerror=alert(1)>" in page.text[place], place
    assert not {tag for tag, _ in page.elements} & {"img", "iframe", "object", "base", "form"}
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", page.html)
    assert block(page)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=200)
    path = Path(config.run_dir) / "selection/selection.json"
    value = json.loads(path.read_text())
    value["composition"]["kind"] = {"<script>1</script>": {"pool": 200, "selected": 10}}
    value["warnings"] = ["<b onclick=1>careful</b>"]
    write_json(path, value)
    page = report(config)
    assert (
        "<script>1</script>" in page.text["composition"]
        and "<b onclick=1>careful</b>" in page.text["signal"]
    )
    assert not [attrs for _, attrs in page.elements if "onclick" in attrs]
    assert sum(tag == "script" for tag, _ in page.elements) == 2


def test_nothing_is_loaded_from_outside(run: tuple[Config, Page]) -> None:
    page = run[1]
    for tag, attrs in page.elements:
        assert tag != "link"
        for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster"):
            assert str(attrs.get(name, "#")).startswith("#"), (tag, attrs)
        assert "url(" not in str(attrs.get("style", ""))
    styles = "".join(re.findall(r"<style>(.*?)</style>", page.html, re.S))
    assert styles and "url(" not in styles and "@import" not in styles
    policy = [
        attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs
    ]
    script = re.findall(r"<script>(.*?)</script>", page.html, re.S)
    assert len(script) == 1  # the policy lets it run by its digest, and no other
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    ]


def test_the_report_imports_no_torch(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=100, variants=False)
    code = (
        "import sys; from pathlib import Path; from grads_ds.config.config import Config\n"
        "from grads_ds.report.stage import run_report\n"
        f"run_report(Config.model_validate({config.model_dump()!r}), Path({config.run_dir!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
