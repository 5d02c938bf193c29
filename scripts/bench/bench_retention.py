"""What the retention measures cost beside the held-out losses of the same sets, in one process.

Evaluates a base model and a copy of it that stands for a trained one, in turn with
`evaluate.retention` and without; once before, so that the base model's answers come from their
cache (generating them happens once for a base model). Two shares: `recorded`, the wall time of own
answers and divergence over that of the other passes of the same run, both from `evaluation.json`;
`processor`, the processor seconds of an evaluation with the measures less those of the one without
that follows it, over the latter's, which other work on the machine changes little. Writes JSON:

    python scripts/bench/bench_retention.py --model M --domain D.jsonl --general G.jsonl --output O
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
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
    parser.add_argument("--max-cost", type=float, default=0.2, help="evaluate.retention.max_cost")
    parser.add_argument("--repeats", type=int, default=5)
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

        def measured(retention: dict[str, float] | None) -> tuple[float, dict[str, Any] | None]:
            """(processor seconds of an evaluation, what it recorded of the measures)."""
            tree["evaluate"]["retention"] = retention
            began = time.process_time()
            run_evaluate(Config.model_validate(tree), folder)
            seconds = time.process_time() - began
            return seconds, json.loads((folder / "evaluation.json").read_text()).get("retention")

        first = measured({"max_cost": args.max_cost})[1]
        assert first is not None
        runs = []
        for _ in range(args.repeats):
            seconds, record = measured({"max_cost": args.max_cost})
            without, _ = measured(None)
            assert record is not None
            parts = record["seconds"]
            runs.append(
                {
                    "seconds": parts,
                    "recorded": round(parts["retention"] / parts["losses"], 4),
                    "processor_seconds": [round(seconds, 2), round(without, 2)],
                    "processor": round(seconds / without - 1, 4),
                }
            )
    result = {
        "script": "scripts/bench/bench_retention.py",
        "model": args.model.name,
        "rows": args.rows,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        "max_cost": args.max_cost,
        "plan": first["plan"],
        "generation_seconds": first["seconds"]["generation"],
        "median": {
            share: round(statistics.median(run[share] for run in runs), 4)
            for share in ("recorded", "processor")
        },
        "runs": runs,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(args.output.read_text())


if __name__ == "__main__":
    main()
