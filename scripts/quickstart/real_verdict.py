"""The real quickstart's last words: what was kept of each planted kind, and what to do with that.

    python scripts/quickstart/real_verdict.py [RUN]       # default: runs/quickstart_real/run

Reads the run's prepared pool, selections and evaluation; writes nothing. The advice follows from
the intervals: it is for this pool and this model.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from datasets import load_from_disk

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from grads_ds.report.outcome import Outcome, outcome_of
from grads_ds.run_dir.layout import MAIN, selection_folder

KINDS = ("good", "near_duplicate", "off_domain", "trivial", "wrong_answer")
PLANTED = KINDS[2:]  # rows that teach something else; a repeated good row teaches nothing new
Counts = dict[str, Counter[str]]


def kept_by_kind(run: Path) -> Counts:
    """Rows of each kind in the pool, in the selection and in the random subset."""
    pool = load_from_disk(str(run / "prepared/pool"))
    kinds = [json.loads(text)["kind"] for text in pool["metadata"]]
    found = {"pool": Counter(kinds)}
    for name in (MAIN, "random"):
        table = pq.read_table(run / selection_folder(name) / "selection.parquet")
        chosen = set(table.filter(table["selected"])["sample_id"].to_pylist())
        pairs = zip(pool["sample_id"], kinds, strict=True)
        found[name] = Counter(kind for sample, kind in pairs if sample in chosen)
    return found


def as_table(found: Counts) -> str:
    """The counts, one line for each subset."""
    lines = [f"{'rows':<10}" + "".join(f"{kind.replace('_', ' '):>16}" for kind in KINDS)]
    for name, counts in found.items():
        lines.append(f"{name:<10}" + "".join(f"{counts[kind]:>16}" for kind in KINDS))
    return "\n".join(lines)


def advice(found: Counts, outcome: Outcome) -> list[str]:
    """What a reader can do now."""
    mine, blind = (sum(found[name][kind] for kind in PLANTED) for name in (MAIN, "random"))
    said = [f"Planted faults among the chosen rows: {mine}; among as many random rows: {blind}."]
    chosen = outcome.model(MAIN)
    gap = chosen.measures["domain"].against_random if chosen else None
    if gap is None:
        return [*said, "The models were not compared: run the evaluation (grads-ds run)."]
    text = f"{gap.value:+.4f} nats against random rows"
    if gap.interval:
        text += f" ({gap.interval[0]:+.4f} to {gap.interval[1]:+.4f})"
    if gap.tone == "good":
        said.append(f"Held-out loss: {text}. Use this selection on such a pool.")
    elif gap.tone == "bad":
        said.append(
            f"Held-out loss: {text}. Do not use this selection here: random rows are better."
        )
    elif mine < blind:
        said.append(
            f"Held-out loss: {text}, within chance. The selection is the cleaner one and costs"
            " nothing in loss: use it where wrong rows do harm, random rows where they do not."
        )
    else:
        said.append(
            f"Held-out loss: {text}, within chance. Random rows do as well here and cost less."
        )
    return [*said, "One pool, one seed: try another (--set seed=1) before you count on it."]


def main() -> None:
    """Print table and advice."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart_real/run")
    found = kept_by_kind(run)
    outcome = outcome_of(json.loads((run / "evaluation.json").read_text()), run)
    print(as_table(found))
    print()
    for sentence in advice(found, outcome):
        print(f"* {sentence}")


if __name__ == "__main__":
    main()
