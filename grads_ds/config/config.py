"""The whole configuration: every section, and the checks between them.

Read by `load.py`. No torch import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from grads_ds.config.deepspeed_file import read_deepspeed
from grads_ds.config.errors import UserError, nearest, problem
from grads_ds.config.evaluate import EvaluateConfig, forgetting_problems
from grads_ds.config.frontier_variants import with_frontier
from grads_ds.config.model_and_data import DataConfig, ModelConfig
from grads_ds.config.probe import ProbeConfig
from grads_ds.config.record import NAME, Record
from grads_ds.config.select import SelectConfig
from grads_ds.config.training import SftConfig
from grads_ds.config.validation import validation_sentence

ANCHOR_SET = "anchor"  # the prepared set of an anchor that is none of data.validation


BUILTIN_VARIANTS = ("full",)  # subsets that exist without a selection


RESERVED_VARIANTS = ("base", "full", "selected")


class Config(Record):
    """Everything one run needs. Paths are relative to the directory the command is started in."""

    run_dir: str = Field(description="folder that receives every artefact")
    seed: int = Field(0, ge=0, description="the one seed behind every random choice")
    model: ModelConfig
    data: DataConfig
    probe: ProbeConfig = Field(default_factory=ProbeConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    sft: SftConfig = Field(default_factory=SftConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    deepspeed: str = Field(
        "zero3",
        description="a preset (zero3, zero2, zero3_offload, zero3_hpz) or the path of a DeepSpeed"
        " JSON file; read, never rewritten",
    )
    provenance: dict[str, Any] = Field(
        default_factory=dict,
        exclude=True,
        description="written into the saved copy of a config, ignored when read",
    )

    @model_validator(mode="before")
    @classmethod
    def _frontier_is_variants(cls, given: Any) -> Any:
        return with_frontier(given)

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        problems = (
            variant_problems(self.select, self.sft) + _sft_problems(self) + _nested_problems(self)
        )
        problems += forgetting_problems(self.evaluate, list(self.data.validation))
        if self.anchor_sources() and ANCHOR_SET in self.data.validation:
            problems.append(
                f"probe.anchor: its own files are prepared under the name {ANCHOR_SET}, which"
                " data.validation has too; rename the set there"
            )
        if problems:
            raise UserError(problems)
        return self

    def anchor_set(self) -> str:
        """The prepared set that is the anchor."""
        return ANCHOR_SET if self.anchor_sources() else str(self.probe.anchor)

    def anchor_sources(self) -> list[str]:
        """The anchor's own sources; none when it is one of data.validation, or there is none."""
        anchor = self.probe.anchor
        if anchor is None or (isinstance(anchor, str) and anchor in self.data.validation):
            return []
        return [anchor] if isinstance(anchor, str) else list(anchor)

    def prepared_sets(self) -> dict[str, list[str]]:
        """Everything that is prepared, by name: the pool, what is replayed, the held-out sets, and
        an anchor of its own.
        """
        replay = {"replay": list(self.data.replay)} if self.data.replay else {}
        anchor = {ANCHOR_SET: self.anchor_sources()} if self.anchor_sources() else {}
        return {"pool": list(self.data.train)} | replay | self.data.validation_sources() | anchor

    def deepspeed_json(self) -> dict[str, Any]:
        """The user's DeepSpeed settings as they stand.

        Raises UserError when the file is missing or not a JSON object.
        """
        return read_deepspeed(self.deepspeed)


def variant_problems(select: SelectConfig, sft: SftConfig) -> list[str]:
    problems = []
    for name, changes in select.variants.items():
        where = f"select.variants.{name}"
        if not NAME.fullmatch(name) or name in RESERVED_VARIANTS:
            problems.append(
                f"{where}: the name must be letters, digits, '_', '-' or '.', and none of"
                f" {RESERVED_VARIANTS}"
            )
        if "variants" in changes:
            problems.append(
                f"{where}.variants: a variant has no variants of its own; remove the key"
            )
            continue
        try:
            select.resolve(name)
        except ValidationError as error:
            problems += [
                validation_sentence(item, SelectConfig, prefix=where) for item in error.errors()
            ]
    known = [*BUILTIN_VARIANTS, *select.variants]
    for name in sft.variants:
        if name not in known:
            problems.append(
                f"sft.variants: {name!r} is neither full nor one of"
                f" select.variants{nearest(name, known)}"
            )
    return problems


def _nested_problems(config: Config) -> list[str]:
    """A run that writes into a folder it reads would change its own inputs with every file."""
    run_dir = Path(config.run_dir).resolve()
    read = [("model.path", config.model.path)]
    read += [("data", source) for group in config.prepared_sets().values() for source in group]
    return [
        problem(
            "run_dir",
            "a folder outside of what the run reads",
            f"{run_dir} in {where} {path}",
            "name one elsewhere",
        )
        for where, path in read
        if Path(path).is_dir() and run_dir.is_relative_to(Path(path).resolve())
    ]


def _sft_problems(config: Config) -> list[str]:
    problems, sft = [], config.sft
    if sft.replay and not config.data.replay:
        problems.append(
            "sft.replay: wanted general rows in data.replay to draw from; found none; add them or"
            " set it to 0"
        )
    chosen_by = [
        config.select.weights,
        *(changes.get("weights") for changes in config.select.variants.values()),
    ]
    if sft.weights and not {"inverse_density", "preference"} & set(chosen_by):
        problems.append(
            "sft.weights: wanted select.weights to be inverse_density or preference; found none,"
            " under which all samples count alike; set select.weights"
        )
    if sft.adapter and config.model.lora is None:
        problems.append(
            "sft.adapter: wanted model.lora, whose adapter it writes; found null; set model.lora or"
            " sft.adapter to false"
        )
    if sft.sequence_parallel > 1 and config.model.attention == "eager":
        problems.append(
            "sft.sequence_parallel: wanted model.attention to be sdpa or flash_attention_2; found"
            " eager, which DeepSpeed's Ulysses does not know; set model.attention"
        )
    if sft.sequence_parallel > 1 and sft.packing:
        problems.append(
            "sft.packing: wanted false with sft.sequence_parallel, whose attention keeps no packed"
            " samples apart; found true; set one of them back"
        )
    problems += _lora_problems(config)
    watched = sft.early_stopping.set if sft.early_stopping else None
    if watched is not None and watched not in config.data.validation:
        names = list(config.data.validation)
        problems.append(
            f"sft.early_stopping.set: {watched!r} is not one of"
            f" data.validation{nearest(watched, names)}"
        )
    return problems


def _lora_problems(config: Config) -> list[str]:
    """What of `model.lora` goes together with no recording in the training, or no shared tokens."""
    lora, problems = config.model.lora, []
    if lora is None:
        return []
    if config.probe.epochs > 0 and config.probe.record == "during":
        problems = [
            f"model.lora.{key}: wanted probe.record: after, as norms are not recorded while such"
            " adapters train; found during; set probe.record"
            for key in ("dora", "modules_to_save", "load_in_4bit")
            if getattr(lora, key)
        ]
    if lora.load_in_4bit and config.sft.sequence_parallel > 1:
        problems.append(
            "sft.sequence_parallel: wanted 1 with model.lora.load_in_4bit, which was not tried with"
            f" it; found {config.sft.sequence_parallel}; set one of them back"
        )
    return problems
