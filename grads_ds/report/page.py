"""A gathered run -> the page's HTML: the headline, then one section after the other.

Everything the rows or the config say is escaped by the templates, and printable. To add a section,
write its function (run, outcome) -> values and its template, and give it a line in `SECTIONS`.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from grads_ds.config.errors import printable
from grads_ds.report import sections
from grads_ds.report.number_words import FILTERS, percent, signed
from grads_ds.report.outcome import Outcome, outcome_of
from grads_ds.report.read_run import Run, Subset
from grads_ds.report.row_table import rows
from grads_ds.run_dir.layout import MAIN


@dataclass(frozen=True)
class Section:
    """A section of the page; `name` is its id and its template's, `fill` gives what it shows."""

    name: str
    title: str
    fill: Callable[[Run, Outcome | None], dict[str, Any]]


SECTIONS = (
    Section("forgetting", "In short", sections.forgetting),
    Section("verdict", "Verdict", sections.verdict),
    Section("evaluation", "Evaluation", sections.evaluation),
    Section("signal", "Gradient signal", sections.signal),
    Section("length", "Length and norm", sections.length),
    Section("composition", "Composition", sections.composition),
    Section("methods", "Methods", sections.methods),
    Section("norms", "Norms", sections.norms),
    Section("rows", "Rows", rows),
    Section("samples", "Samples", sections.samples),
    Section("training", "Training", sections.training),
    Section("settings", "Settings", sections.settings),
)


def templates() -> Environment:
    """The report's templates; what they are given is escaped."""
    environment = Environment(
        loader=PackageLoader("grads_ds.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


def render(run: Run) -> str:
    """The whole page as text."""
    environment = templates()
    outcome = outcome_of(run.evaluation, run.run_dir) if run.evaluation else None
    filled = []
    for section in SECTIONS:
        shown = section.fill(run, outcome)
        # escaped already, by its own template
        body = Markup(environment.get_template(f"{section.name}.html").render(**shown))
        filled.append({"id": section.name, "title": section.title, "body": body})
    main = run.subsets[0]
    script = Markup(source(environment, "rows.js"))
    page = environment.get_template("page.html").render(
        name=run.run_dir.resolve().name,
        run_dir=run.run_dir,
        model=(run.config.get("model") or {}).get("path", "?"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        main=main,
        pool=len(run.scores.sample_id),
        tiles=tiles(run, main, outcome),
        sections=filled,
        script=script,
        allowed=allowed_by_digest(script),
    )
    return printable(page)


def source(environment: Environment, name: str) -> str:
    """A file of the templates' folder as it stands."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def allowed_by_digest(script: str) -> str:
    """The source expression of a content security policy that lets this one script run, and nothing
    that a row could have brought (CSP level 2, hash-source).
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def tiles(run: Run, main: Subset, outcome: Outcome | None) -> list[tuple[str, str, str, str]]:
    """(label, value, remark, tone) of the numbers at the top."""
    chosen, pool = int(main.selected.sum()), len(run.scores.sample_id)
    found = [
        ("pool", f"{pool:,}", f"samples, {int(run.scores.ok.sum()):,} scored", ""),
        (
            "selected",
            f"{chosen:,}",
            f"{percent(chosen / max(1, pool))} of the pool, by {main.report.get('method', '?')}",
            "",
        ),
    ]
    model = outcome.model(MAIN) if outcome else None
    if outcome is None or model is None:
        return found
    for name in [*outcome.domain, *outcome.general][:4]:
        measure = model.measures.get(name)
        if measure is None or measure.against_base is None:
            continue
        gap = measure.against_base
        remark = "loss against base"
        if name in outcome.domain and measure.against_random is not None:
            remark += f", {signed(measure.against_random.value)} against random"
        found.append(
            (
                f"{name} {'gain' if name in outcome.domain else 'forgetting'}",
                signed(gap.value),
                remark,
                gap.tone,
            )
        )
    return found
