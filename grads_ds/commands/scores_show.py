"""`grads-ds scores show RUN`: quantiles, medians by source, the samples at both ends."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from grads_ds.commands.score_tables import aligned, prepared_pool, score_table, value_columns
from grads_ds.config.errors import WRONG_PATH, UserError

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
TEXT_SHOWN = 160  # characters of a sample's text


def add(actions: Any) -> None:
    """Declare `show`."""
    show = actions.add_parser(
        "show", help="quantiles, by source, the samples at the top and the bottom with their text"
    )
    show.add_argument("run", metavar="RUN", type=Path, help="run directory")
    show.add_argument(
        "--by", metavar="COLUMN", help="column that orders the samples (default: the last norm)"
    )
    show.add_argument(
        "--samples", type=int, default=5, metavar="N", help="samples shown at each end (default 5)"
    )
    show.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    """Print what `show` finds; exit status 0."""
    print(show(args.run, args.by, args.samples))
    return 0


def show(run: Path, by: str | None, samples: int) -> str:
    """The table in words: counts, quantiles of every value, medians by source, the samples at both
    ends of `by`.
    """
    import numpy as np

    table = score_table(run)
    names = value_columns(table)
    by = by or names[-1]
    if by not in names:
        raise UserError(f"--by: wanted one of {', '.join(names)}; found {by}")
    statuses = table["status"].to_numpy()
    counted = ", ".join(
        f"{int((statuses == status).sum()):,} {status}" for status in np.unique(statuses)
    )
    lines = [f"{run}: {table.num_rows:,} samples ({counted})", *_made_by(run), ""]
    ok = statuses == "ok"
    head = ["", *(f"{quantile:.0%}" for quantile in QUANTILES)]
    values = {name: table[name].to_numpy().astype(float) for name in names}
    body = [
        [name, *(f"{q:.4g}" for q in np.quantile(x[ok], QUANTILES))]
        for name, x in values.items()
        if ok.any()
    ]
    lines += [*aligned([head, *body]), ""]
    pool = prepared_pool(run)
    places = pool.positions(table["sample_id"].to_numpy())
    codes, sources = pool.fields()["source"]
    found = codes[places]
    by_source = [["source", "samples", *(f"median {name}" for name in names)]]
    for code, source in enumerate(sources):
        here = ok & (found == code)
        if here.any():
            by_source.append(
                [
                    source,
                    f"{int(here.sum()):,}",
                    *(f"{np.median(x[here]):.4g}" for x in values.values()),
                ]
            )
    lines += [*aligned(by_source), ""]
    order = np.flatnonzero(ok)[np.argsort(-values[by][ok], kind="stable")]
    count = min(max(0, samples), len(order))
    for title, chosen in (
        (f"highest {by}", order[:count]),
        (f"lowest {by}", order[len(order) - count :][::-1]),
    ):
        lines.append(title)
        for i, row in zip(chosen.tolist(), pool.rows(places[chosen]), strict=True):
            tokens = table["num_target_tokens"][i].as_py()
            lines.append(
                f"  {values[by][i]:.4g}  sample {table['sample_id'][i]}, {tokens} target tokens:"
                f" {_shortened(row)}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _made_by(run: Path) -> list[str]:
    """How the table came to be, from its manifest."""
    try:
        manifest = json.loads((run / "scores/manifest.json").read_text())
    except (*WRONG_PATH, ValueError):
        return []
    hosts = manifest.get("hosts") or []
    return [
        f"model {manifest.get('model')}, {manifest.get('world_size')} ranks on"
        f" {', '.join(map(str, hosts))}"
    ]


def _shortened(row: str) -> str:
    """The words of a user's row, on one line."""
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                if key not in ("role", "from", "id"):
                    collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(json.loads(row))
    text = " | ".join(" ".join(words.split()) for words in found if words.strip())
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
