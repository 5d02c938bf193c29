"""What `grads-ds plan` predicts against what this project's own stages take: memory at the peak of
a step, bytes on the wire.

    python scripts/bench/plan_errors.py [--only WORDS] [--output docs/results/plan_errors.json]
    python scripts/bench/plan_errors.py --times

--times adds the times of a few cases to the output, as far as they can be measured here.

Every case trains (grads_ds/training/train.py) or records (grads_ds/engine/frozen_pass.py) a random
Llama for a few steps on 1 or 2 ranks (gloo, CPU) and counts the bytes of all tensors alive, at
most, within one step of the rank that needs most, and what goes into its collectives. Prints
predicted, measured and the error of each; ends with status 1 if one is off by 10 % or more. About
ten minutes on two cores. `--times` runs on one rank without counting, in processor time: a step (or
micro-batch) against what the rate that grads_ds/plan/calibrate.py finds in the same process
predicts. No limit stands on these.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.plan_cases import CASES, CHECKPOINTED, Case, Size, make
from scripts.bench.plan_rank import rank

LIMIT = 0.10


def measured(case: Case, folder: Path) -> dict[str, float]:
    """Run `case`, made in `folder`, under torchrun; what its heaviest rank took."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={case.ranks}",
    ]
    command += [str(Path(__file__).resolve()), "--rank", str(folder)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if len(list(folder.glob("rank*.json"))) != case.ranks:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-6000:])
    return heaviest(folder)


def heaviest(folder: Path) -> dict[str, float]:
    """The most that any rank of a case made in `folder` took."""
    each = [json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json"))]
    return {key: max(found[key] for found in each) for key in each[0]}


def predicted(case: Case, config_file: Path, rate: float = 1e12) -> dict[str, float]:
    """What the plan says of the same configuration, on ranks that compute at `rate`."""
    from grads_ds.config.load import load_config
    from grads_ds.plan.cluster import Cluster
    from grads_ds.plan.forecast import forecasts
    from grads_ds.plan.shapes import model_config

    config = load_config(config_file)
    cluster = Cluster(1, case.ranks, 2.0**40, rate, 1e9)
    found = {
        item.stage: item
        for item in forecasts(config, model_config(config.model.path), cluster, 1e6)
    }
    item = found["sft" if case.what == "sft" else "recording"]
    step = {"peak": item.memory.device, "bytes": item.traffic.step(item.micro_batches)}
    return step | {"seconds": item.seconds_per_step}


def compare(
    case: Case, size: Size, measure: Callable[[Case, Path], dict[str, float]] = measured
) -> list[dict[str, Any]]:
    """One line for memory and one for traffic: predicted, measured, error in percent."""
    with tempfile.TemporaryDirectory(prefix="plan_errors.") as name:
        config_file = make(Path(name), case, size)
        said, found = predicted(case, config_file), measure(case, Path(name))
    lines = []
    for what, label in (("peak", "bytes of memory"), ("bytes", "bytes received")):
        if not found[what] and not said[what]:
            continue
        error = 100 * (said[what] / found[what] - 1) if found[what] else float("inf")
        line = {
            "case": case.name,
            "what": label,
            "predicted": round(said[what]),
            "measured": round(found[what]),
            "error %": round(error, 1),
        }
        print(
            f"{case.name}: {label}: predicted {said[what]:,.0f}, measured {found[what]:,.0f},"
            f" {error:+.1f} %",
            flush=True,
        )
        lines.append(line)
    return lines


def times(size: Size) -> list[dict[str, Any]]:
    """Processor seconds of a step on one rank, predicted from the rate that its own process
    reached.
    """
    lines = []
    for case in CASES:
        if case.ranks > 1 or case.zero["stage"] < 3 or case.config not in ({}, CHECKPOINTED):
            continue
        with tempfile.TemporaryDirectory(prefix="plan_errors.") as name:
            config_file = make(Path(name), case, size)
            Path(name, "timed").touch()
            found = measured(case, Path(name))
            said = predicted(case, config_file, found["rate"])
        error = round(100 * (said["seconds"] / found["seconds"] - 1), 1)
        lines.append(
            {
                "case": case.name,
                "predicted": round(said["seconds"], 3),
                "measured": round(found["seconds"], 3),
                "error %": error,
            }
        )
        print(f"{case.name}: seconds of a step: {lines[-1]}", flush=True)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """As Markdown, in megabytes: the table of docs/planning.md."""
    rows = [
        "| case | memory: predicted | measured | error | received: predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(line["case"] for line in lines):
        cells = [case]
        for what in ("bytes of memory", "bytes received"):
            found = next(
                (line for line in lines if (line["case"], line["what"]) == (case, what)), None
            )
            cells += (
                ["", "", ""]
                if found is None
                else [
                    f"{found['predicted'] / 1e6:.1f}",
                    f"{found['measured'] / 1e6:.1f}",
                    f"{found['error %']:+.1f} %",
                ]
            )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name holds these words")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--predict", action="store_true", help="say what is predicted and measure nothing"
    )
    parser.add_argument(
        "--times", action="store_true", help="measure times alone, and put them into the output"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        rank(options.rank)
        return 0
    size = Size()
    if options.predict:
        for case in CASES:
            if options.only in case.name:
                with tempfile.TemporaryDirectory(prefix="plan_errors.") as name:
                    print(case.name, predicted(case, make(Path(name), case, size)))
        return 0
    if options.times:
        found = times(size)
        if options.output:
            options.output.write_text(
                json.dumps(json.loads(options.output.read_text()) | {"times": found}, indent=1)
                + "\n"
            )
        return 0
    before = json.loads(options.output.read_text()) if options.only and options.output else {}
    known = before.get("comparisons", [])
    lines = []
    for case in CASES:  # those that are not run keep what they were
        if options.only in case.name:
            lines += compare(case, size)
        else:
            lines += [line for line in known if line["case"] == case.name]
    worst = max(abs(line["error %"]) for line in lines)
    print(f"{len(lines)} comparisons, the worst {worst:.1f} % off")
    if options.output:
        import deepspeed
        import torch

        about = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
        }
        options.output.write_text(
            json.dumps(before | about | {"model": vars(size), "comparisons": lines}, indent=1)
            + "\n"
        )
    return 1 if worst >= 100 * LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
