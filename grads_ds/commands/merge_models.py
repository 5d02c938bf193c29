"""`grads-ds merge RUN --alpha A --out FOLDER`: a model between the base and a trained one
(docs/forgetting.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, nearest, problem
from grads_ds.config.load import load_config
from grads_ds.run_dir.digests import content_digest
from grads_ds.run_dir.layout import MAIN, adapter_folder, model_folder, trained_names
from grads_ds.run_dir.ownership import new_folder_problems
from grads_ds.run_dir.provenance import RESOLVED, resolved_is_whole
from grads_ds.run_dir.publish import atomic_path
from grads_ds.run_dir.units import damaged_outputs, read_record


def add(command: argparse.ArgumentParser) -> None:
    """Declare the command."""
    command.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    command.add_argument(
        "--alpha",
        required=True,
        type=float,
        metavar="A",
        help="from 0, the base model, to 1, the trained one",
    )
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="a new folder")
    command.add_argument(
        "--variant",
        default=MAIN,
        metavar="NAME",
        help="which trained model (default: that of the main selection)",
    )
    command.add_argument(
        "--adapter",
        action="store_true",
        help="scale the run's LoRA adapter instead, which is exact and small",
    )
    command.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Merge, and say what was written."""
    resolved = args.run / RESOLVED
    problems = []
    if not 0 <= args.alpha <= 1:
        problems.append(problem("--alpha", "a number from 0 to 1", f"{args.alpha:g}", "change it"))
    problems += new_folder_problems("--out", args.out)
    if not resolved.is_file():
        problems.append(
            problem("RUN", f"a run's folder with {RESOLVED}", f"{args.run}", "give one")
        )
        raise UserError(problems)
    config = load_config(str(resolved))
    known = trained_names(config)
    place = adapter_folder if args.adapter else model_folder
    source = args.run / place(args.variant)
    if args.variant not in known:
        found = f"{args.variant}{nearest(args.variant, known)}"
        problems.append(problem("--variant", "a model that this run trains", found, "change it"))
    elif not source.is_dir():
        fix = "train with sft.adapter: true" if args.adapter else "run: grads-ds sft CONFIG"
        problems.append(problem("merge", f"{source}", "none", fix))
    else:
        problems += _changed_since(args.run, config, f"sft/{args.variant}")
    if problems:
        raise UserError(problems)
    from grads_ds.engine.base_folder import base_folder
    from grads_ds.engine.interpolation import interpolate, scale_adapter
    from grads_ds.evaluate.merged_card import merged_card

    with atomic_path(args.out) as aside:
        aside.mkdir()
        if args.adapter:
            scale_adapter(source, args.alpha, aside)
        else:
            interpolate(
                base_folder(config), source, args.alpha, aside, lambda what: print(what, flush=True)
            )
        (aside / "README.md").write_text(merged_card(config, args.variant, args.alpha))
    kind = "adapter" if args.adapter else "model"
    print(f"merge: {kind} at {args.alpha:g} between {config.model.path} and {source} in {args.out}")
    return 0


def _changed_since(run: Path, config: Config, unit: str) -> list[str]:
    """Problems of what is about to be read: each file is to be as the training `unit` left it, and
    the base model as it found it.
    """
    record = read_record(run, unit)
    if record is None:
        wrong = [f"no record that {unit} is finished"]
    else:
        wrong = damaged_outputs(run, record, thorough=True)
        base = content_digest(config.model.path)
        if base is not None and base != record["inputs"].get("model files", base):
            wrong.append(f"{config.model.path} with other files than {unit} began from")
    if not resolved_is_whole(run):
        wrong.append(f"{RESOLVED} was altered")
    fix = "run: grads-ds run CONFIG"
    return [problem("merge", "a run as it was written", found, fix) for found in wrong]
