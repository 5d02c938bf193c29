"""Rows, a model and a machine -> the values of a configuration, each with its reason.

Pure functions; what they were told is what `look_at_rows`, `hold_out` and `machine` found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grads_ds.first_config.look_at_rows import SAMPLED, Rows
from grads_ds.first_config.machine import Machine, Model
from grads_ds.first_config.setting import Setting

_CUT = 0.99  # share of the rows that data.max_length leaves whole
_LONGEST = {True: 4096, False: 1024}  # on GPUs, on CPUs
# millions of parameters times tokens of the pool up to which a CPU trains on all of it too
_WHOLE_POOL = 2_000_000
STATE_BYTES, ROOM = 16, 0.7  # of a parameter in bf16 training; share of a GPU left for states


@dataclass(frozen=True)
class Facts:
    """What the values hang on. `train`: rows of the pool after the split; `tokens`: of them, by the
    rows that were tokenised; `held_out`: the folder of each held-out set.
    """

    rows: Rows
    train: int
    held_out: dict[str, str]
    held_out_why: str
    pool: list[str]
    model: Model
    machine: Machine
    max_length: int

    @property
    def tokens(self) -> int:
        """Tokens of the pool, cut at max_length."""
        known = self.rows.lengths[self.rows.usable(self.max_length)]
        return int(np.minimum(known, self.max_length).mean() * self.train) if len(known) else 0


def longest(rows: Rows, model: Model, machine: Machine) -> tuple[int, str]:
    """(data.max_length, why): a multiple of 64 that leaves `_CUT` of the rows whole, within the
    model's positions and what one machine can do.
    """
    lengths = rows.lengths[rows.lengths > 0]
    number, most = len(lengths), int(lengths.max())
    share = int(np.quantile(lengths, _CUT, method="higher"))
    cap, limit = _LONGEST[machine.gpus > 0], "a start on GPUs" if machine.gpus else "a CPU"
    if model.positions and model.positions <= cap:
        cap, limit = model.positions, "the model's positions"
    value = min(max(64, 64 * math.ceil(share / 64)), cap)
    whole = int((lengths <= value).sum())
    words = f"{whole:,} of {number:,} rows are whole (longest {most:,} tokens)"
    if len(rows.keys) > SAMPLED:
        words += f", of {SAMPLED:,} drawn"
    if share > value:
        words += f"; {cap:,} is the limit of {limit}"
    if lost := number - int(rows.usable(value).sum()):
        words += f"; without an answer within it, and so dropped: {lost:,}"
    return value, words


def learning_rate(parameters: int | None, lora: bool) -> tuple[float, str]:
    """(peak learning rate, why): between the rates that this project trained with."""
    if lora:
        return 2e-4, "adapters take some ten times the rate of all parameters"
    if parameters is None:
        return 1e-5, "usual for models of some billions of parameters"
    # 1.5e-3 at 1.4 M (quickstart), 1e-4 at 135 M (study), 1e-5 at 7 B (usual) lie on one line
    exact = min(max(1e-5 * (7e9 / parameters) ** 0.585, 5e-6), 2e-3)
    rounded = float(f"{exact:.0e}")
    return rounded, (
        f"for {parameters / 1e6:,.0f} M parameters, on the line through 1.5e-3 at 1.4 M,"
        " 1e-4 at 135 M and 1e-5 at 7 B"
    )


def batch(chosen: int, epochs: float, ranks: int) -> tuple[int, str]:
    """(samples per optimizer step, why): 32 where that leaves 20 steps, less where not."""
    size = next((n for n in (32, 16, 8) if chosen * epochs / n >= 20), 8)
    value = ranks * math.ceil(size / ranks)
    steps = max(1, math.ceil(chosen * epochs / value))
    return value, f"{steps:,} optimizer steps over the chosen rows; {ranks} ranks share it equally"


def budget(train: int) -> tuple[float, str]:
    """(select.budget, why)."""
    if train < 5_000:
        return 0.25, (
            f"a quarter of {train:,} rows: with few rows every smaller subset over-fits"
            " (docs/STUDY.md)"
        )
    return 0.1, "a tenth; docs/methods.md says what smaller ones cost"


def choose(facts: Facts, name: str) -> list[Setting]:
    """Every value, in the order of the file. `name` is that of the run."""
    machine, model = facts.machine, facts.model
    share, why_share = budget(facts.train)
    epochs = 3.0 if facts.train * share < 2_000 else 2.0
    size, why_size = batch(round(facts.train * share), epochs, machine.ranks)
    adapters = _adapters(model, machine)
    rate, why_rate = learning_rate(model.parameters, lora=bool(adapters))
    limit = 16384 if machine.gpus else 4096
    tokens = max(limit, facts.max_length)
    micro = min(max(1, limit // 4 // facts.max_length), size // machine.ranks)
    first = machine.gpus > 0 or (model.parameters or 0) < 50e6
    return [
        Setting("run_dir", f"runs/{name}", "receives every artefact of the run"),
        Setting("seed", 0, "the one seed behind every random choice"),
        Setting("model.path", model.path, model.words()),
        Setting(
            "model.dtype",
            "bfloat16" if machine.gpus else "float32",
            machine.words() + ("" if machine.gpus else "; CPUs are slow in half precision"),
        ),
        *adapters,
        *_data(facts),
        Setting("probe.epochs", 1.0 if first else 0.0, _why_probe(first, machine)),
        Setting("probe.layers", ["embedding", "lm_head"], "the method's own two groups"),
        Setting("probe.learning_rate", rate, why_rate),
        Setting("probe.batch_size", size, "as in sft"),
        Setting("probe.micro_batch_size", micro, "as in sft"),
        Setting("probe.tokens_per_microbatch", tokens, "bounds the memory of the frozen pass"),
        Setting(
            "select.method",
            "grads",
            "the default; docs/methods.md says which method when, and what each was worth",
        ),
        Setting("select.budget", share, why_share),
        Setting("select.near_duplicates", 0.8, "rows that repeat a chosen one are not chosen"),
        Setting(
            "select.variants",
            {"random": {"method": "random"}},
            "the yardstick: as many rows, drawn blindly",
        ),
        Setting("sft.epochs", epochs, "passes over the chosen rows: more where they are few"),
        Setting("sft.learning_rate", rate, "as in the probe"),
        Setting("sft.batch_size", size, why_size),
        Setting(
            "sft.micro_batch_size",
            micro,
            f"samples of up to {facts.max_length:,} tokens per rank and pass; lower it when memory"
            " runs out",
        ),
        *([Setting("sft.gradient_checkpointing", True, _WHY_RECOMPUTE)] if _large(model) else []),
        _compared(facts),
        Setting("evaluate.tokens_per_microbatch", tokens, "as in the probe"),
        Setting("deepspeed", "zero3", "parameters, gradients and states shared by all ranks"),
    ]


def _adapters(model: Model, machine: Machine) -> list[Setting]:
    """LoRA where the states of all parameters are more than this machine's GPUs hold."""
    states = STATE_BYTES * (model.parameters or 0) / 2**30
    room = ROOM * machine.gib * machine.gpus
    if not machine.gpus or states <= room:
        return []
    why = (
        f"weights, gradients and AdamW's states of all parameters take {states:,.0f} GiB, and"
        f" {ROOM:.0%} of the GPUs' memory is {room:,.0f} GiB: adapters alone are trained; null"
        " trains everything, on more GPUs or with deepspeed: zero3_offload"
    )
    return [Setting("model.lora", {"r": 16, "alpha": 32.0}, why)]


_WHY_RECOMPUTE = "activations are recomputed: a quarter more computing, a fraction of the memory"


def _large(model: Model) -> bool:
    return (model.parameters or 0) > 1e9


def _data(facts: Facts) -> list[Setting]:
    rows = facts.rows
    _, why_length = longest(rows, facts.model, facts.machine)
    found = [
        Setting("data.train", facts.pool, f"{facts.train:,} rows"),
        Setting("data.validation", facts.held_out, facts.held_out_why),
        Setting("data.max_length", facts.max_length, why_length),
    ]
    if rows.left_out:
        kinds = ", ".join(f"{kind} ({n:,} times)" for kind, n in sorted(rows.left_out.items()))
        found.append(
            Setting("data.dropped_content", "count", f"the chat template leaves out: {kinds}")
        )
    if rows.fields:
        fields = ", ".join(f"{name}: {n} values" for name, n in rows.fields.items())
        found.append(
            Setting(
                "data.metadata", list(rows.fields), f"the report groups rows by them ({fields})"
            )
        )
    return found


def _why_probe(first: bool, machine: Machine) -> str:
    if first:
        return "one preliminary epoch over the pool, then every sample's norms"
    return (
        f"scores the model as it is: an epoch over the pool takes too long on {machine.cores}"
        " cores; 1.0 is the method's own"
    )


def _compared(facts: Facts) -> Setting:
    """Which variants are trained besides the selection."""
    model = facts.model.parameters
    quick = facts.machine.gpus > 0 and facts.train <= 20_000
    if model and not facts.machine.gpus:
        quick = facts.tokens * model / 1e6 <= _WHOLE_POOL
    names: Sequence[str] = ["random", "full"] if quick else ["random"]
    why = "trained too, for comparison" + ("" if quick else "; add full for the whole pool")
    return Setting("sft.variants", list(names), why)
