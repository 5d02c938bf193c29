"""The study's numbers put where they are read: the tables in docs/STUDY.md and README.md, and the
figure docs/images/study.png.

    python scripts/study/pages.py            # write them from docs/results/study_*.json
    python scripts/study/pages.py --check    # exit status 1 where a page shows other numbers

A table stands between `<!-- study: NAME -->` and `<!-- end of NAME -->`. Needs nothing but the
committed JSON.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from collections.abc import Callable

from scripts.study import probes, real_tables
from scripts.study.figures import draw, draw_budgets
from scripts.study.lever_pages import levers_table, limits_table, plain_table, published_table
from scripts.study.page_tables import across, main_tables, results, rule_tables
from scripts.study.single_tables import (
    cost_table,
    kept_table,
    lengths_table,
    pooled_table,
    replay_table,
)
from scripts.study.tables import forgetting, gain, tables

PAGES = ("docs/STUDY.md", "README.md")
FIGURE, BUDGETS = "docs/images/study.png", "docs/images/study_budgets.png"


TABLES: dict[str, Callable[[], str]] = {
    "real": real_tables.trained_table,
    "real, pooled": real_tables.pooled_table,
    "real, promise": real_tables.promise_table,
    "second candidate, pooled": lambda: real_tables.pooled_table("doubt"),
    "second candidate, single": real_tables.single_table,
    "real, needles": real_tables.needle_table,
    "real, what is chosen": real_tables.chosen_table,
    "real, what columns see": real_tables.seen_table,
    "epochs": lambda: main_tables("epochs"),
    "steps": lambda: main_tables("steps"),
    "steps to the whole pool": lambda: main_tables("steps", "full"),
    "kept": kept_table,
    "rule": rule_tables,
    "pilot": lambda: across("pilot"),
    "probes": lambda: probes.table(results("probes")),
    "cost": cost_table,
    "noise": lambda: across("noise"),
    "pooled": pooled_table,
    "noise, forgetting": lambda: across("noise", forgetting),
    "budgets at equal epochs": lambda: across("budgets", equal="epochs"),
    "budgets at equal steps": lambda: across("budgets", equal="steps"),
    "budgets at equal steps to the whole pool": lambda: across("budgets", gain, "full", "steps"),
    "forgetting at equal steps to the whole pool": lambda: across(
        "budgets", forgetting, "full", "steps"
    ),
    "few at the whole pool's steps": lambda: tables(results("steps")["runs"]).strip(),
    "hundreds of rows to the whole pool": (
        lambda: tables(results("many_rows")["runs"], "full").strip()
    ),
    "gentle": lambda: across("gentle", gain, "full"),
    "gentle, forgetting": lambda: across("gentle", forgetting, "full"),
    "published": lambda: tables(results("published")["runs"]).strip(),
    "the default without its lengths": lengths_table,
    "replay": replay_table,
    "levers, limits": limits_table,
    "levers, merges": plain_table,
    "levers": levers_table,
    "levers, what fits": published_table,
    "size": lambda: across("size"),
    "size, forgetting": lambda: across("size", forgetting),
}


def filled(text: str) -> str:
    """A page with its tables as the numbers are now.

    Raises KeyError for a table that nobody makes.
    """

    def one(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]]()}\n{found[3]}"

    return re.sub(
        r"(<!-- study: ([\w, ']+) -->)\n.*?(<!-- end of \2 -->)", one, text, flags=re.DOTALL
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit status 1 where pages are out of date",
    )
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        text = (REPO / page).read_text()
        if filled(text) != text:
            stale.append(page)
            if not options.check:
                (REPO / page).write_text(filled(text))
    if options.check:
        raise SystemExit(
            f"out of date: {', '.join(stale)}; run: python scripts/study/pages.py" if stale else 0
        )
    runs = [run for run in results("main")["runs"] if run["equal"] == "epochs" and run["noise"] > 0]
    draw(runs, REPO / FIGURE)
    draw_budgets(results("budgets")["runs"], REPO / BUDGETS)
    print(f"written: {', '.join([*stale, FIGURE, BUDGETS])}")


if __name__ == "__main__":
    main()
