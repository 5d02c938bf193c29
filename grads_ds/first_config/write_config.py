"""The whole of `grads-ds init`: look, split, choose, write, and check that what was written loads.

Writes the configuration and its folder of rows; the folder as a whole or not at all.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds import __version__
from grads_ds.config.errors import UserError, problem
from grads_ds.config.load import load_config
from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.leaks import SHARED
from grads_ds.data.problems import Problems
from grads_ds.data.sources import find_inputs
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.engine.model_check import check_model
from grads_ds.first_config.choose_values import Facts, choose, longest
from grads_ds.first_config.hold_out import Split, candidates, hold_out, write_split
from grads_ds.first_config.look_at_rows import Rows, format_words, read_rows, sampled, tokenise
from grads_ds.first_config.machine import Machine, Model, look_at_model, this_machine
from grads_ds.first_config.other_tools import Borrowed
from grads_ds.first_config.setting import Setting, as_yaml, override
from grads_ds.run_dir.publish import atomic_path

FOUR_BITS = "load_in_4bit"
FEWEST = 4  # rows that a run needs: two to choose from, two to judge by


@dataclass(frozen=True)
class Request:
    """What `grads-ds init` was asked for: sources of the pool and of general rows, the model's
    folder or hub id, the configuration to write, the seed of the split, what another tool's
    configuration says.
    """

    data: Sequence[str]
    model: str
    general: Sequence[str]
    out: Path
    seed: int = 0
    borrowed: Borrowed | None = None


def write_config(request: Request, machine: Machine | None = None) -> list[str]:
    """Write the configuration and its folder of rows; what to tell the user, line by line.

    Raises UserError where nothing can be made of the files or the model, or `out` exists.
    """
    folder = request.out.with_name(f"{request.out.stem}_data")
    asked = ModelConfig(path=request.model)
    tokenizer = _checked(request, asked, folder)
    machine = machine or this_machine()
    model = look_at_model(asked, tokenizer)
    with atomic_path(folder) as aside:
        aside.mkdir()
        rows, split, max_length = _look(request, aside / "spool", tokenizer, model, machine)
        train, kept = write_split(rows, split, aside)
        held_out = {"domain": f"{folder}/held_out"} if kept else {}
        why = _why_split(rows, split, kept, request.seed)
        if request.general:
            number = _general(request, aside, tokenizer, max_length, rows.keys)
            held_out["general"] = f"{folder}/general/held_out"
            why += f"; general: {number:,} rows"
        facts = Facts(rows, train, held_out, why, [f"{folder}/train"], model, machine, max_length)
        settings = choose(facts, request.out.stem)
        if request.borrowed:
            settings = override(settings, _given(request.borrowed, machine))
        (aside / "spool").unlink()
        with atomic_path(request.out) as draft:
            draft.write_text(as_yaml(settings, _heading(request, machine)), encoding="utf-8")
            load_config(draft)
    return [
        model.words(),
        *format_words(rows),
        *_dropped(rows),
        *_not_taken(request.borrowed, machine),
        f"{kept:,} rows held out, {train:,} left as the pool: {folder}/",
        f"{request.out}: {len(settings)} values, each with its reason",
        *([] if request.general else [_NO_GENERAL]),
    ]


def _checked(request: Request, model: ModelConfig, folder: Path) -> Any:
    """The model's tokenizer. Raises UserError with everything that is wrong before a row is read:
    places that are taken, sources that are not there, what the model lacks.
    """
    fix = "remove it or give another --out"
    taken = [place for place in (request.out, folder) if place.exists()]
    problems = [problem(str(p), "a new place", "something there", fix) for p in taken]
    for entries in (request.data, request.general):
        missing = Problems()
        find_inputs(entries, missing)
        problems += missing.shown
    problems += check_model(model.path)
    try:
        tokenizer = load_tokenizer(model)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return tokenizer


_NO_GENERAL = (
    "no general rows were given (--general DATA), so the report cannot say what is forgotten"
)


def _given(borrowed: Borrowed, machine: Machine) -> list[Setting]:
    """The other tool's values; its batch is what one step takes on this machine's ranks."""
    given = [_on_this_machine(one, machine) for one in borrowed.settings]
    values = {one.key: one for one in given}
    if micro := values.get("sft.micro_batch_size"):
        size = micro.value * borrowed.accumulation * machine.ranks
        why = f"{micro.value} x {borrowed.accumulation} accumulation steps x {machine.ranks} ranks"
        given.append(Setting("sft.batch_size", size, why))
    if rate := values.get("sft.learning_rate"):
        given.append(Setting("probe.learning_rate", rate.value, "as in sft"))
    return given


def _on_this_machine(setting: Setting, machine: Machine) -> Setting:
    """The setting; adapters on a base in 4 bits are plain ones where there is no GPU."""
    if setting.key != "model.lora" or machine.gpus or not setting.value.get(FOUR_BITS):
        return setting
    value = {name: held for name, held in setting.value.items() if name != FOUR_BITS}
    return Setting(setting.key, value, f"{setting.why}; {FOUR_BITS} needs a GPU")


def _not_taken(borrowed: Borrowed | None, machine: Machine) -> list[str]:
    if not borrowed:
        return []
    said = [f"{len(borrowed.settings)} values are those of the {borrowed.tool} configuration"]
    if any(one != _on_this_machine(one, machine) for one in borrowed.settings):
        said.append(f"{FOUR_BITS} is left out: there is no GPU here")
    if borrowed.left:
        said.append(f"not taken over: {', '.join(borrowed.left)}")
    return said


def _look(
    request: Request, spool: Path, tokenizer: Any, model: Model, machine: Machine
) -> tuple[Rows, Split, int]:
    """(the rows, which of them are held out, data.max_length)."""
    rows = read_rows(request.data, spool, request.seed)
    tried = candidates(rows)
    tokenise(rows, tokenizer, tried | sampled(rows))
    if not (rows.lengths > 0).any():
        reasons = ", ".join(f"{why}: {n:,}" for why, n in sorted(rows.unusable.items()))
        raise UserError([*rows.refused.shown, f"DATA: no row can be learned from ({reasons})"])
    max_length, _ = longest(rows, model, machine)
    usable = int(rows.usable(max_length).sum())
    if usable < FEWEST:
        wanted = f"at least {FEWEST} rows with an answer within {max_length:,} tokens"
        fix = "give shorter rows or a model with more positions"
        raise UserError(problem("DATA", wanted, f"{usable} of {len(rows.keys):,}", fix))
    return rows, hold_out(rows, tried, max_length), max_length


def _general(
    request: Request, folder: Path, tokenizer: Any, max_length: int, pool: np.ndarray
) -> int:
    """Write the held-out rows of the general data, none that the pool (keys uint64 [N]) has too;
    how many.
    """
    spool = folder / "general_spool"
    rows = read_rows(request.general, spool, request.seed)
    tried = candidates(rows) & ~np.isin(rows.keys, pool)
    tokenise(rows, tokenizer, tried)
    split = hold_out(rows, tried, max_length)
    if not split.held_out.any():
        wanted = f"rows that DATA has not, with an answer within {max_length:,} tokens"
        raise UserError(problem("--general", wanted, "none", "give other general data"))
    _, kept = write_split(rows, split, folder / "general", parts=("held_out",))
    spool.unlink()
    return kept


def _why_split(rows: Rows, split: Split, kept: int, seed: int) -> str:
    if not kept:
        return f"nothing held out: {len(rows.keys):,} rows are too few, so nothing can be judged"
    words = f"{kept:,} rows held out of every source in proportion, by seed {seed}"
    if split.near:
        return words + (
            "; the rows repeat each other so much that near-duplicates of the pool are among them"
        )
    return words + (
        f"; none repeats a row of the pool or more than {SHARED:.0%} of its answer's word 8-grams"
        f" ({split.repeated:,} of {split.looked_at:,} looked at did, and stay in the pool)"
    )


def _heading(request: Request, machine: Machine) -> list[str]:
    sources = ", ".join([*request.data, *(f"{source} (general)" for source in request.general)])
    return [
        f"Written by grads-ds {__version__} init for {sources} on a machine with"
        f" {machine.words()}.",
        f"Run it: grads-ds run {shlex.quote(str(request.out))}. Every key: docs/config.md.",
    ]


def _dropped(rows: Rows) -> list[str]:
    """What is not used, each kind with its count."""
    said = []
    if rows.pieces:
        said.append(f"{rows.pieces:,} rows were cut out of longer plain texts, at line ends")
    if rows.refused.count:
        first = rows.refused.shown[0]
        said.append(f"left out, of rows and files: {rows.refused.count:,}; the first: {first}")
    said += [f"{n:,} rows cannot be learned ({why})" for why, n in sorted(rows.unusable.items())]
    return said
