"""Time and memory of `prepare`, `select` and `report` by the number of rows of the pool.

    python scripts/bench/pool_scale.py [--rows 100000 1000000 10000000] [--folder DIR]
        [--out docs/results/pool_scale.json]

Writes that many chats, and runs the three commands of this checkout on them, each in a process of
its own. What a GPU would make in between (scores, a model, an evaluation) is made up and recorded
as done. Prints a line for each command and size: seconds, rows per second, processor seconds and
the peak of proportional memory, with the files they map (PSS) and without. Needs about 3 kB of disk
a row. Sizes that are in the file of results already and are not named stay there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_prepare import REPO, measure, write_chats, write_model

sys.path.insert(0, str(REPO / "scripts/faults"))
COMMANDS = ("prepare", "select", "report")
DEALT = 100_000  # rows whose scores are made up at a time


def config_of(folder: Path, model: Path) -> dict[str, Any]:
    """The config of a run on `folder`/pool.jsonl."""
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {
            "train": [str(folder / "pool.jsonl")],
            "validation": {"domain": str(folder / "domain.jsonl")},
        },
        "probe": {"epochs": 0},
        "select": {"budget": 0.05},
    }


def make_up(settings: dict[str, Any]) -> None:
    """The score table of the prepared pool, a model and an evaluation, recorded as done."""
    import small_run

    from grads_ds import scores
    from grads_ds.config.columns import norm_columns
    from grads_ds.config.config import Config
    from grads_ds.run_dir.units import begin, mark_done

    config = Config.model_validate(settings)
    run_dir = Path(config.run_dir)
    count = json.loads((run_dir / "prepared/prepared.json").read_text())["sets"]["pool"]["kept"]
    unit = small_run._due("probe/record", config)
    assert unit is not None
    begin(run_dir, unit.name, unit.outputs)
    names = norm_columns(list(config.probe.layers))
    recording, schema = scores.Recording({"model": "made up"}, {"ranks": 1}), scores.schema(names)
    scores.prepare_parts(run_dir / "scores", recording)
    writer, draw = (
        scores.PartWriter(run_dir / "scores", 0, recording, schema),
        np.random.default_rng(0),
    )
    for first in range(0, count, DEALT):
        ids = np.arange(first, min(count, first + DEALT))
        tokens = draw.integers(8, 200, len(ids))
        rows = {"sample_id": ids, "sample_hash": ids.astype(str), "num_tokens": tokens + 20}
        norms = {name: draw.lognormal(size=len(ids)) * tokens**-0.3 for name in names}
        writer.add(scores.make_rows(rows, draw.gamma(4.0, 0.5, len(ids)), tokens, norms))
        writer.flush()
    scores.merge(run_dir / "scores", recording.key, np.arange(count), {"epochs": 0}, writer.totals)
    mark_done(run_dir, unit.name, unit.inputs, unit.outputs, 0.0)


def make_up_training(settings: dict[str, Any]) -> None:
    """A model and an evaluation, recorded as done."""
    import small_run

    from grads_ds.config.config import Config
    from grads_ds.run_dir.publish import publish_text
    from grads_ds.run_dir.units import begin, mark_done

    config = Config.model_validate(settings)
    run_dir = Path(config.run_dir)
    for name in ("sft/selected", "evaluate"):
        unit = small_run._due(name, config)
        assert unit is not None
        begin(run_dir, name, unit.outputs)
        if name == "evaluate":
            small_run._make_up_evaluation(run_dir)
        else:
            publish_text(run_dir / "sft/model/model.safetensors", "made up")
        mark_done(run_dir, name, unit.inputs, unit.outputs, 0.0)


def run_size(rows: int, folder: Path) -> list[dict[str, Any]]:
    """The three commands on a pool of `rows` rows."""
    from tests.data import twins

    write_chats(folder / "pool.jsonl", rows)
    write_chats(folder / "domain.jsonl", 1000)
    write_model(folder / "model", twins.CHATML_MARKED)
    settings, file = config_of(folder, folder / "model"), folder / "config.json"
    file.write_text(json.dumps(settings))  # JSON is YAML
    found = []
    for command in COMMANDS:
        if command != "prepare":  # in a process of its own: what it holds is not measured
            step = "make_up" if command == "select" else "make_up_training"
            code = f"import json, pool_scale; pool_scale.{step}(json.load(open({str(file)!r})))"
            begun = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
            subprocess.run(begun, check=True)
        started = [sys.executable, "-m", "grads_ds", command, str(file)]
        figures = measure(started, rows, REPO, {"PYTHONPATH": str(REPO)})
        found.append({"command": command, "rows": rows, **figures})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Run every size; print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the disk has room (default: /tmp)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from grads_ds.run_dir.provenance import source_commit

    run = {
        "commit": source_commit(),
        "cpus": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
    }
    results = []
    if args.out and args.out.exists():
        kept = json.loads(args.out.read_text())["results"]
        results = [result for result in kept if result["rows"] not in args.rows]
    for rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as made:
            results += [figures | run for figures in run_size(rows, Path(made))]
    results.sort(key=lambda result: (COMMANDS.index(result["command"]), result["rows"]))
    record = {"script": "scripts/bench/pool_scale.py", "results": results}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
