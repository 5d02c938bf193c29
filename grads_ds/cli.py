"""The command line: parses it, hands it to the command's file in `commands/`, turns failures into
exit statuses. Only the file of the command that is given is imported, so that --help answers at
once.

Exit status: 0 done; 2 the user's input is wrong (every problem listed); 7 no space left, 8 the file
system failed; 143, 129 stopped by a signal; 1 anything else, with the first failing rank's own
error last. docs/launcher.md has them all. No torch import here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from grads_ds import __version__
from grads_ds.config.errors import StoppedBySignal, UserError, printable
from grads_ds.config.printable_output import printable_output
from grads_ds.distributed import heartbeat, ranks
from grads_ds.export import TOOLS
from grads_ds.launcher.job_outcome import LOCK_LOST, MEANINGS
from grads_ds.run_dir.lock import LostLockError
from grads_ds.run_dir.storage import storage_status

# commands whose own process loads no model: ranks are processes of their own
WITHOUT_MODELS = ("init", "run", "prepare", "select", "report")
*_TOOLS, _LAST = (title for _, title in TOOLS.values())
# name: the function that declares its arguments, what it does; in the order of --help
COMMANDS = {
    "init": ("init:add", "write a commented config for your data files and model"),
    "run": ("run:add_run", "run every stage that is due, in order"),
    "prepare": ("run:add_prepare", "read the data, tokenise it, give every sample an id"),
    "probe": ("run:add_stage", "preliminary training, then every sample's gradient norms"),
    "select": ("run:add_select", "choose the subset from the score table"),
    "sft": ("run:add_stage", "fine-tune on the subset"),
    "evaluate": ("run:add_stage", "held-out losses of the base model and every trained one"),
    "report": ("run:add_stage", "one HTML page about the run"),
    "compare": ("compare_runs:add", "several runs side by side: choice, losses, time"),
    "doctor": ("doctor:add", "check every host before anything expensive starts"),
    "plan": ("plan:add", "predict memory, traffic and time of a run"),
    "scores": ("scores:add", "look at score tables: show, compare, export, verify"),
    "status": ("status:add", "how far a run is, from its files"),
    "check": ("check:add", "read every output again: is it as it was written?"),
    "stop": ("stop:add", "end a run from any machine; training writes a checkpoint first"),
    "export": ("export:add", f"write the chosen subset for {', '.join(_TOOLS)} or {_LAST}"),
    "merge": ("merge_models:add", "write base + a (trained - base): forgets less, learns less"),
    "config": ("config_schema:add", "the config file's JSON schema, for editors"),
}


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The argument parser of `grads-ds`, with the arguments of the commands that `argv` names."""
    top = argparse.ArgumentParser(
        prog="grads-ds",
        description="Gradient-aware data selection and fine-tuning on DeepSpeed: "
        "prepare -> probe -> select -> sft -> evaluate -> report.",
        epilog="start here: grads-ds init DATA... --model M; every command has examples: grads-ds"
        " COMMAND --help; pages: docs/index.md",
    )
    top.add_argument("--version", action="version", version=f"grads-ds {__version__}")
    # deepspeed puts it before the sub-command
    top.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (declared, description) in COMMANDS.items():
        command = commands.add_parser(
            name, help=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in argv:
            from grads_ds.commands.guidance import epilog

            command.epilog = epilog(name, statuses=name == "run")
            module, function = declared.split(":")
            add = getattr(importlib.import_module(f"grads_ds.commands.{module}"), function)
            add(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, translate failures into exit statuses. What is printed meanwhile is printable."""
    with printable_output():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    heartbeat.start()
    own_process, argv = argv is None, sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    if own_process and args.command in WITHOUT_MODELS:
        from grads_ds.data.tokenizer import load_no_models

        load_no_models()
    # progress bars redraw on a terminal; a log gets a line now and then. Ranks inherit what their
    # launcher found.
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "10")
    try:
        status = int(args.handler(args))
    except UserError as error:
        if ranks.launched_rank() == 0:
            _print_problems(error, args.command)
        heartbeat.failed("\n".join(error.problems), 2)
        status = 2
    except StoppedBySignal as told:
        if ranks.launched_rank() == 0:
            print(f"grads-ds: {told}; start it again to go on from there", file=sys.stderr)
        status = told.status
    except LostLockError as error:
        print(f"grads-ds: {error}", file=sys.stderr)
        status = LOCK_LOST
    except KeyboardInterrupt:
        print("grads-ds: interrupted; start it again to go on from here", file=sys.stderr)
        status = 130
    except Exception as error:
        status = storage_status(error) or 1
        text = printable(traceback.format_exc())
        if status != 1:
            text += f"grads-ds: {MEANINGS[status]} (exit status {status})\n"
        print(text, file=sys.stderr, flush=True)
        heartbeat.failed(text, status)
    if ranks.launched():
        # without Python's orderly exit: after a failure it would wait for ranks that sit in a
        # collective, and after a success threads of torch's process groups abort it now and then
        # ("terminate called", torch 2.13 with gloo); all is published
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _print_next_step(args, status)
    return status


def _print_next_step(args: argparse.Namespace, status: int) -> None:
    if not sys.stderr.isatty():
        return
    from grads_ds.commands.next_step import next_step

    if line := next_step(args, status):
        sys.stdout.flush()
        print(f"next: {line}", file=sys.stderr, flush=True)


def _print_problems(error: UserError, command: str) -> None:
    from grads_ds.commands.guidance import pages_for

    count = len(error.problems)
    print(f"grads-ds: {count} problem{'s' if count > 1 else ''} in the input", file=sys.stderr)
    for problem in error.problems:
        print(f"  - {problem}", file=sys.stderr)
    print(f"  see {', '.join(pages_for(error.problems, command))}", file=sys.stderr)
    sys.stderr.flush()
