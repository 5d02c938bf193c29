"""`grads-ds doctor CONFIG`: is every host fit for the run? A table, advice for each problem; exit
status 2 when there is one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from grads_ds.commands.options import add_placement, placement
from grads_ds.commands.run import add_config
from grads_ds.commands.watching import add_watch, watched
from grads_ds.config.config import Config
from grads_ds.config.errors import printable
from grads_ds.config.load import load_config
from grads_ds.flow.host_needs import compiled_ops, input_paths
from grads_ds.launcher.doctor.examine import examine, glance
from grads_ds.launcher.doctor.findings import Finding
from grads_ds.launcher.job_outcome import DONE, WRONG_INPUT
from grads_ds.run_dir.ownership import claim

WATCH_SECONDS = 60.0
_MARKS = {"ok": "ok", "warning": "WARNING", "problem": "PROBLEM"}


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    add_config(command)
    add_placement(command)
    shape = command.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="findings as JSON")
    add_watch(shape, "again and again, beside a run: starts nothing on the hosts", WATCH_SECONDS)
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Examine, print, and say by the status whether a run may start."""
    config = load_config(args.config, args.set)
    claim(Path(config.run_dir))  # every host is to write there
    place, run_dir = placement(args), Path(config.run_dir)
    files, ops = input_paths(config), compiled_ops(config)
    if args.watch is not None:
        return watched(lambda: (_changes(*glance(place, run_dir, files, ops)), True), args.watch)
    findings = examine(place, run_dir, files, ops)
    findings += _fit(config)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print_table(findings)
    return WRONG_INPUT if any(finding.level == "problem" for finding in findings) else DONE


def _changes(lost: dict[str, str], findings: list[Finding]) -> str:
    """What is not as it should be, and how much is: the same text while nothing changes."""
    wrong = [finding for finding in findings if finding.level != "ok"]
    lines = [f"{_MARKS['problem']}  {problem}" for problem in lost.values()]
    lines += [f"{_MARKS[finding.level]}  {finding}" for finding in wrong]
    return "\n".join([*lines, f"checks that are fine: {len(findings) - len(wrong)}"])


def _fit(config: Config) -> list[Finding]:
    """Whether tokenizer, model and `data.max_length` fit each other."""
    from grads_ds.data.model_limits import fit_problems
    from grads_ds.data.tokenizer import check_tokenizer

    if not Path(config.model.path, "config.json").is_file() or check_tokenizer(config.model):
        return []  # a hub id, or a problem that prepare tells
    problems = [problem.rpartition("; ") for problem in fit_problems(config)]
    return [Finding("tokens", "*", "problem", found, advice) for found, _, advice in problems] or [
        Finding("tokens", "*", "ok", "tokenizer, model and data.max_length fit")
    ]


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "check", "host", "found"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        found = finding.found + (f"\n-> {finding.advice}" if finding.advice else "")
        shown = (printable(text) for text in (finding.check, finding.host, found))
        table.add_row(_MARKS[finding.level], *shown)
    # no colours: nothing that acts on a terminal passes (config/printable_output.py)
    console = Console(color_system=None, highlight=False, markup=False, soft_wrap=False)
    console.print(table)
    problems = sum(finding.level == "problem" for finding in findings)
    console.print(f"{problems} problems" if problems != 1 else "1 problem")
