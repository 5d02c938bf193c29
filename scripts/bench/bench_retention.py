"""What the retention measures cost beside the held-out losses of the same sets, in one process.

Evaluates a base model and a copy of it that stands for a trained one, with `evaluate.retention`
(twice: the second time the base model's answers come from their cache) and without. The share is
the wall time of own answers and divergence over that of the other passes of the same run, both from
`evaluation.json`. Writes JSON:

    python scripts/bench/bench_retention.py --model M --domain D.jsonl --general G.jsonl --output O
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> None:
    """Parse, prepare, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "domain", "general", "output"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=120, help="held-out rows of each set")
    args = parser.parse_args()
    from grads_ds.config.config import Config
    from grads_ds.data.stage import run_prepare
    from grads_ds.distributed import ranks
    from grads_ds.evaluate.stage import run_evaluate

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sets = {}
        for name in ("domain", "general"):
            sets[name] = str(folder / f"{name}.jsonl")
            with getattr(args, name).open() as lines, open(sets[name], "w") as out:
                out.writelines(islice(lines, args.rows))
        tree: dict[str, Any] = {
            "run_dir": place,
            "model": {"path": str(args.model), "dtype": "float32"},
            "data": {"train": [sets["domain"]], "validation": sets, "max_length": 512},
            "evaluate": {"tokens_per_microbatch": 4096, "bootstrap": 100, "retention": {}},
        }
        config = Config.model_validate(tree)
        run_prepare(config, folder)
        (folder / "selection").mkdir()
        (folder / "selection/selected.jsonl").write_text("{}\n")
        (folder / "sft").mkdir()
        (folder / "sft/model").symlink_to(args.model.resolve())
        ranks.start()
        found = []
        for retention in ({}, {}, None):
            tree["evaluate"]["retention"] = retention
            began = time.monotonic()
            run_evaluate(Config.model_validate(tree), folder)
            seconds = time.monotonic() - began
            record = json.loads((folder / "evaluation.json").read_text()).get("retention")
            measured = None
            if record is not None:
                parts = record["seconds"]
                share = round(parts["retention"] / parts["losses"], 4)
                measured = {"plan": record["plan"], "seconds": parts, "share": share}
            found.append({"whole_seconds": round(seconds, 2), "retention": measured})
    result = {
        "script": "scripts/bench/bench_retention.py",
        "model": args.model.name,
        "rows": args.rows,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        "runs": found,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(args.output.read_text())


if __name__ == "__main__":
    main()
