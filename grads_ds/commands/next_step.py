"""What to do next: the last line that a command says on a terminal, in one place for all of them.

Where there is no terminal nothing is said: a script has no use for it.
"""

from __future__ import annotations

import argparse
import shlex

from grads_ds.config.errors import UserError
from grads_ds.flow.stages import STAGE_NAMES
from grads_ds.launcher.job_outcome import WRONG_INPUT
from grads_ds.launcher.submit import queue_for
from grads_ds.run_dir.lock import lock_holder

# by command, after exit status 0; {config} and {run} as the command was given them
_NEXT = {
    "init": "grads-ds run {config}",
    "prepare": "grads-ds probe {config}",
    "probe": "grads-ds select {config} --preview shows what would be chosen",
    "select": "grads-ds sft {config}",
    "sft": "grads-ds evaluate {config}",
    "evaluate": "grads-ds report {config}",
    "report": "open {run}/report.html; grads-ds export {config} hands the subset to other tools",
    "compare": "grads-ds compare ... --html FILE has it as a page",
    "doctor": "grads-ds plan {config} for its cost, grads-ds run {config} to start",
    "plan": "grads-ds doctor {config}, then grads-ds run {config}",
    "scores": "grads-ds select CONFIG --preview shows what a choice from these scores would be",
    "status": "grads-ds run CONFIG goes on from what is done; grads-ds check {run} reads it again",
    "check": "grads-ds run CONFIG makes again what is altered or gone, and nothing else",
    "stop": "the same grads-ds run as before goes on from the last checkpoint",
    "export": "give {out} to {tool}; docs/exports.md has the lines of its config",
    "merge": "load {out} as any model's folder; docs/forgetting.md says what to expect of it",
    "config": "name the schema in your editor's settings for YAML; docs/config.md has every key",
}
_AGAIN = "give the same command again: what is finished stays"
# said already, by the command line itself, with what to do
_INTERRUPTED = (129, 130, 143)


def next_step(args: argparse.Namespace, status: int) -> str:
    """One line for a command that has ended with `status`; "" where there is nothing to say."""
    if status in _INTERRUPTED:
        return ""
    if status == WRONG_INPUT:
        return "change what is listed above, then give the same command again"
    words = _words(args)
    run = "run" if args.command in ("run", *STAGE_NAMES) else args.command
    if status:
        known = run == "run" and "run" in words
        look = "grads-ds status {run} and the logs in {run}/logs tell more; " if known else ""
        return (look + _AGAIN).format(**words)
    try:
        return _after(args).format(**words)
    except KeyError:  # a command that was given no config
        return ""


def _after(args: argparse.Namespace) -> str:
    if getattr(args, "dry_run", False):
        return "the same command without --dry-run starts it"
    if getattr(args, "preview", False):
        return "grads-ds select {config} keeps this choice"
    if getattr(args, "detach", False) or _queued(args):
        return "grads-ds status {run} --watch"
    if args.command == "run":
        return _NEXT[args.last]
    if args.command == "init":
        return _plan_of_this_machine() + _NEXT["init"]
    if args.command == "status":
        told = args.json or args.prometheus or args.watch is not None
        if told:
            return ""
        at_work = lock_holder(args.run_dir) is not None
        return "grads-ds status {run} --watch follows it" if at_work else _NEXT["status"]
    if args.command == "compare" and args.html is not None:
        return f"open {shlex.quote(str(args.html))}"
    return _NEXT.get(args.command, "")


def _plan_of_this_machine() -> str:
    """The plan that a new configuration deserves first, where there are GPUs to plan for."""
    from grads_ds.first_config.machine import this_machine

    machine = this_machine()
    if not machine.gpus:
        return ""
    cluster = f"--cluster 1x{machine.gpus} --gpu-memory {machine.gib:.0f} --calibrate"
    return f"grads-ds plan {{config}} {cluster}, then "


def _queued(args: argparse.Namespace) -> bool:
    """Whether the command has put the run into a queue, and has not waited for its end."""
    queue = queue_for(args.backend) if hasattr(args, "wait") else None
    return queue is not None and not (queue.WAITS and args.wait)


def _words(args: argparse.Namespace) -> dict[str, str]:
    """What the lines speak of, quoted for a shell."""
    found = {}
    if getattr(args, "config", None):
        found["config"] = shlex.quote(args.config)
        try:
            from grads_ds.config.load import load_config

            found["run"] = shlex.quote(load_config(args.config, args.set).run_dir)
        except UserError:
            pass  # it was wrong, or is no longer there
    if getattr(args, "run_dir", None):
        found["run"] = shlex.quote(str(args.run_dir))
    if args.command == "init":
        found["config"] = shlex.quote(str(args.out))
    if args.command in ("export", "merge"):
        found["out"] = shlex.quote(str(args.out))
    if args.command == "export":
        found["tool"] = args.to
    return found
