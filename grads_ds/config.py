"""The configuration: one YAML file -> one frozen, typed, fully resolved `Config`.

Reads a YAML file and `key=value` overrides; writes nothing. Every key is documented where it
stands. Unknown keys, wrong types and contradictions are collected and raised together as one
`UserError`, each with what was wanted, what was found and what to change. No torch import.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

EXTRAS = ("ifd", "el2n", "anchor", "early")  # further columns of the score table
ANCHOR_SET = "anchor"  # the prepared set of an anchor that is none of data.validation
LAYER_GROUPS = ("embedding", "lm_head", "attention", "mlp", "norm", "lora")
BUILTIN_VARIANTS = ("full",)  # subsets that exist without a selection
RESERVED_VARIANTS = ("base", "full", "selected")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class UserError(Exception):
    """The user's input is wrong.

    Carries every fault found; the command line prints them all and exits with status 2.
    """

    def __init__(self, faults: Sequence[str] | str):
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def expanded(value: Any) -> Any:
    """A path, or a list of them, with `~` and `$VAR` replaced: here alone, so that the same files
    are read and watched for changes.
    """
    if isinstance(value, list):
        return [expanded(item) for item in value]
    return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value


class LoraConfig(_Record):
    """Low-rank adapters (PEFT) instead of full-parameter training."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(
        32.0, gt=0, description="scale of the adapters (alpha / r multiplies their output)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapters' input during training"
    )
    target_modules: str | list[str] = Field(
        "all-linear", description="module names, or 'all-linear'"
    )


class ModelConfig(_Record):
    """The model to adapt."""

    path: str = Field(description="a Hugging Face folder or hub id")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of weights and activations"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        "sdpa", description="attention implementation"
    )
    lora: LoraConfig | None = Field(None, description="null trains every parameter")
    chat_template: str | None = Field(
        None, description="a Jinja file replacing the tokenizer's own chat template"
    )
    trust_remote_code: bool = Field(False, description="run model code that ships with the weights")

    @field_validator("path", "chat_template", mode="before")
    @classmethod
    def _paths_are_expanded(cls, value: Any) -> Any:
        return expanded(value)


class DataConfig(_Record):
    """The pool to choose from and the held-out sets to judge by."""

    train: list[str] = Field(
        min_length=1, description="files, folders or hub ids; together they are the pool"
    )
    validation: dict[str, str | list[str]] = Field(
        default_factory=dict, description="held-out sets by name, e.g. {domain: ..., general: ...}"
    )
    replay: list[str] = Field(
        default_factory=list,
        description="general training rows that sft.replay mixes in against forgetting",
    )
    format: Literal[
        "auto",
        "alpaca",
        "sharegpt",
        "messages",
        "prompt_completion",
        "prompt_completion_text",
        "text",
    ] = Field(
        "auto",
        description=(
            "row format; auto looks at each source's keys. prompt_completion is a chat of two"
            " turns, prompt_completion_text plain text of which the completion is learned"
        ),
    )
    dropped_content: Literal["refuse", "count"] = Field(
        "refuse",
        description=(
            "what of a row the chat template leaves out (a system prompt, tool schemas, calls and"
            " results, reasoning): refuse the row, or leave it out and count it"
        ),
    )
    max_length: int = Field(2048, ge=8, description="longest sample, in tokens")
    overlong: Literal["truncate", "drop"] = Field(
        "truncate", description="what happens to a sample above max_length"
    )
    metadata: list[str] = Field(
        default_factory=list,
        description="row fields carried along for the report's composition tables",
    )

    @field_validator("train", "replay", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: Any) -> Any:
        return expanded([value] if isinstance(value, str) else value)

    @field_validator("validation", mode="before")
    @classmethod
    def _sources_are_expanded(cls, value: Any) -> Any:
        return (
            {name: expanded(sources) for name, sources in value.items()}
            if isinstance(value, dict)
            else value
        )

    @field_validator("validation")
    @classmethod
    def _names_are_folder_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not _NAME.fullmatch(name) or name in ("pool", "replay"):
                raise ValueError(
                    f"the set name {name!r} must be letters, digits, '_', '-' or '.', and neither"
                    " 'pool' nor 'replay'"
                )
        return value

    def validation_sources(self) -> dict[str, list[str]]:
        """The held-out sets, each as a list of sources."""
        return {
            name: [src] if isinstance(src, str) else list(src)
            for name, src in self.validation.items()
        }


class TrainingConfig(_Record):
    """Optimisation settings shared by the preliminary phase and SFT."""

    epochs: float = Field(3.0, ge=0, description="passes over the training rows; may be a fraction")
    learning_rate: float = Field(1.0e-5, gt=0, description="peak learning rate")
    batch_size: int = Field(32, ge=1, description="samples per optimizer step, over all ranks")
    micro_batch_size: int = Field(
        4, ge=1, description="samples per rank and forward pass (at most)"
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay of the learning rate"
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass"
    )
    checkpoint_steps: int = Field(
        500, ge=1, description="optimizer steps between resumable checkpoints"
    )
    checkpoints_kept: int = Field(
        2, ge=1, description="finished checkpoints kept while training; older ones are removed"
    )


class ProbeConfig(TrainingConfig):
    """The preliminary phase and the recording of gradient norms."""

    epochs: float = Field(
        1.0, ge=0, description="length of the preliminary training; 0 scores the model as it is"
    )
    record: Literal["after", "during"] = Field(
        "after",
        description=(
            "after: a frozen pass over the pool; during: while the preliminary phase trains"
        ),
    )
    layers: list[str] | Literal["all"] = Field(
        default_factory=lambda: ["embedding", "lm_head"],
        description=(
            f"parameter groups whose norms are recorded: any of {', '.join(LAYER_GROUPS)}, or all"
        ),
    )
    tokens_per_microbatch: int = Field(
        16384, ge=8, description="tokens of one frozen micro-batch per rank, padding included"
    )
    flush_seconds: float = Field(
        5.0,
        ge=0,
        description="scores at most this old are lost with a killed rank (or 2 % of a long pass)",
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="a sample's loss is the mean or the sum over its target tokens"
    )
    extras: list[str] = Field(
        default_factory=list,
        description=(
            f"further columns, for the rivals of selection: any of {', '.join(EXTRAS)}"
            " (docs/selection.md)"
        ),
    )
    anchor: str | list[str] | None = Field(
        None,
        description=(
            "extras anchor: a set of data.validation by name, or files, folders or hub ids of"
            " its own"
        ),
    )

    @field_validator("anchor", mode="before")
    @classmethod
    def _anchor_is_expanded(cls, value: Any) -> Any:
        return expanded(value)

    @field_validator("extras")
    @classmethod
    def _known_extras(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in EXTRAS:
                raise ValueError(f"{name!r} is not an extra column{_nearest(name, EXTRAS)}")
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _extras_fit(self) -> ProbeConfig:
        if ("anchor" in self.extras) != (self.anchor is not None):
            raise ValueError(
                "extras: [anchor] and anchor: SET want each other; found one alone; give both or"
                " neither"
            )
        if "early" in self.extras and self.epochs == 0:
            raise ValueError(
                "extras early compares with the model before training; found epochs 0; set epochs"
                " above 0"
            )
        if self.extras and self.record == "during" and self.epochs > 0:
            raise ValueError(
                "extras are recorded on frozen weights; found record: during; set record: after"
            )
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _known_groups(cls, value: Any) -> Any:
        if value == "all" or value == ["all"]:
            return "all"
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names:
            raise ValueError(f"wanted a list of {', '.join(LAYER_GROUPS)}, or all")
        for name in names:
            if name not in LAYER_GROUPS:
                raise ValueError(
                    f"{name!r} is not a layer group{_nearest(str(name), [*LAYER_GROUPS, 'all'])}"
                )
        return list(dict.fromkeys(names))


class SelectConfig(_Record):
    """How the subset is chosen from the score table (docs/selection.md tells what each choice
    means).
    """

    METHODS: ClassVar[tuple[str, ...]] = (
        "grads",
        "random",
        "length_matched",
        "loss",
        "perplexity_band",
        "length",
        "grand",
        "el2n",
        "ifd",
        "k_center",
        "snr",
        "anchor_conflict",
        "orthogonal",
        "less",
        "mixture",
    )
    COMBINATIONS: ClassVar[tuple[str, ...]] = ("sum", "product", "l2", "zscore", "joint")

    method: str = Field(
        "grads", description="grads, a rival (docs/selection.md) or the name of an installed plugin"
    )
    budget: float | Literal["auto"] = Field(
        0.05,
        description=(
            "fraction (0, 1] of the pool (1 is all of it), number of samples (>= 2), or auto"
        ),
    )
    budget_tokens: int | None = Field(
        None, ge=1, description="budget in tokens of the chosen samples; replaces budget"
    )
    signal: str = Field(
        "product",
        description=(
            "how norms become one: sum, product, l2, zscore, joint, or one group's name, e.g."
            " lm_head, total"
        ),
    )
    groups: list[str] = Field(
        default_factory=lambda: ["embedding", "lm_head"],
        min_length=1,
        description="parameter groups that signal combines",
    )
    scale: Literal["log", "linear"] = Field(
        "log", description="scale on which the signal's density is estimated"
    )
    standardise: Literal["robust", "none"] = Field(
        "robust", description="robust: each group's norms over their median"
    )
    length_correction: bool = Field(
        False, description="norms less their trend in the number of target tokens (log-log)"
    )
    bandwidth: Literal["silverman", "scott", "isj"] | float = Field(
        "silverman", description="kernel width: a rule, or a number in units of the signal"
    )
    boundary: Literal["auto", "mirror", "none"] = Field(
        "auto", description="mirror the density at zero; auto: on the linear scale only"
    )
    region: Literal["density", "magnitude", "mass", "band", "sample"] = Field(
        "density", description="which part of the signal's distribution is chosen"
    )
    band: tuple[float, float] = Field(
        (0.25, 0.75), description="quantiles of region band and of method perplexity_band"
    )
    forget_less: float = Field(
        0.0,
        ge=0,
        description=(
            "grads: places (share of the pool) lost per unit of conflict with the general anchor"
        ),
    )
    mixture: dict[str, float] = Field(
        default_factory=dict, description="method mixture: weight of each method's rank"
    )
    strata: str | None = Field(
        None, description="source, or a data.metadata field: spread the budget over its values"
    )
    strata_balance: Literal["proportional", "equal"] = Field(
        "proportional", description="each stratum's share: as in the pool, or the same for all"
    )
    near_duplicates: float | None = Field(
        None,
        gt=0,
        le=1,
        description=(
            "Jaccard similarity from which a later sample is dropped and replaced; null keeps all"
        ),
    )
    order: Literal["preference", "signal", "shuffled", "pool"] = Field(
        "preference", description="order of selected.jsonl"
    )
    weights: Literal["none", "inverse_density", "preference"] = Field(
        "none",
        description=(
            "column weight of selection.parquet (mean 1 over the chosen) for weighted training"
        ),
    )
    plugin_options: dict[str, Any] = Field(
        default_factory=dict, description="handed to a plugin method as it stands"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="named subsets chosen beside the main one: settings that differ from it",
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in cls.METHODS:
            plugins = sorted(entry.name for entry in entry_points(group="grads_ds.selection"))
            if value not in plugins:
                raise ValueError(
                    f"{value!r} is not a selection"
                    f" method{_nearest(value, [*cls.METHODS, *plugins])}"
                )
        return value

    @field_validator("signal")
    @classmethod
    def _known_signal(cls, value: str) -> str:
        known = [*cls.COMBINATIONS, *LAYER_GROUPS, "total"]
        if value not in known:
            raise ValueError(f"{value!r} is not a signal{_nearest(value, known)}")
        return value

    @field_validator("groups")
    @classmethod
    def _known_groups(cls, value: list[str]) -> list[str]:
        known = [*LAYER_GROUPS, "total"]
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is not a layer group{_nearest(name, known)}")
        return list(dict.fromkeys(value))

    @field_validator("bandwidth")
    @classmethod
    def _positive(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError(f"wanted silverman, scott, isj or a number above 0; found {value:g}")
        return value

    @field_validator("band")
    @classmethod
    def _quantiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(
                f"wanted two quantiles, low before high, within 0 and 1; found {list(value)}"
            )
        return value

    @model_validator(mode="after")
    def _mixture_fits(self) -> SelectConfig:
        if self.method == "mixture" and not self.mixture:
            raise ValueError(
                "method mixture wants mixture: {method: weight, ...}; found none; name at least one"
                " method"
            )
        for name, weight in self.mixture.items():
            if name == "mixture":
                raise ValueError("a mixture cannot hold itself; remove mixture from select.mixture")
            type(self)._known_method(name)
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"the weight of {name} in mixture must be above 0; found {weight:g}"
                )
        if self.signal == "joint" and len(self.groups) != 2:
            raise ValueError(
                f"signal joint wants two groups; found {self.groups}; give groups: [embedding,"
                " lm_head]"
            )
        return self

    @field_validator("budget")
    @classmethod
    def _a_budget(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not (0 < value <= 1 or (value >= 2 and value % 1 == 0)):
            raise ValueError(
                "wanted a fraction above 0 and up to 1, a whole number of samples from 2 on, or"
                f" auto; found {value:g}"
            )
        return value

    def resolve(self, name: str | None) -> SelectConfig:
        """The settings of one named subset (None: the main one), without `variants`."""
        base = self.model_dump(exclude={"variants"})
        return SelectConfig(**(base | (self.variants[name] if name else {})))


class EarlyStoppingConfig(_Record):
    """When fine-tuning ends before its last step; the model kept is that of the lowest held-out
    loss.
    """

    set: str = Field("domain", description="the set of data.validation whose loss is watched")
    every: int = Field(
        50, ge=1, description="optimizer steps between two looks, each with a checkpoint"
    )
    patience: int = Field(
        3, ge=1, description="looks in a row without a lower loss after which training ends"
    )
    min_delta: float = Field(
        0.0, ge=0, description="nats by which the loss has to fall to count as lower"
    )


class SftConfig(TrainingConfig):
    """Fine-tuning on the chosen rows."""

    variants: list[str] = Field(
        default_factory=list,
        description=(
            "also trained, for comparison: names of select.variants, or full (the whole pool)"
        ),
    )
    equal: Literal["epochs", "steps"] = Field(
        "epochs",
        description=(
            "what every variant shares: the number of epochs, or the full pool's optimizer steps"
        ),
    )
    packing: bool = Field(
        False,
        description=(
            "the samples of a micro-batch share rows of up to data.max_length tokens, none seeing"
            " another; same steps, no padding"
        ),
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description=(
            "ranks that share the tokens of each sample (Ulysses), for samples too long for one GPU"
        ),
    )
    adapter: bool = Field(
        False,
        description=(
            "with model.lora: the adapter is also written by itself, to the folder adapter beside"
            " the merged model"
        ),
    )
    weights: bool = Field(
        False, description="samples count by the weight that select.weights gave them"
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training rows that are drawn from data.replay; 0.1 is one in ten",
    )
    early_stopping: EarlyStoppingConfig | None = Field(None, description="null trains all steps")


class HarnessConfig(_Record):
    """Tasks of lm-evaluation-harness (the extra `eval`)."""

    tasks: list[str] = Field(
        min_length=1, description="task or group names, as the harness has them"
    )
    include_path: str | None = Field(
        None, description="folder of task files; with it only those are known, offline"
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="examples before each question; null: as the task says"
    )
    limit: int | None = Field(
        None, ge=1, description="only so many questions per task, for a trial"
    )


class EvaluateConfig(_Record):
    """Judging the base model and every trained one on the held-out sets."""

    tokens_per_microbatch: int = Field(
        16384, ge=8, description="tokens of one micro-batch per rank, padding included"
    )
    bootstrap: int = Field(1000, ge=10, description="resamples behind each confidence interval")
    multiple_choice: dict[str, str] = Field(
        default_factory=dict,
        description="JSONL files by name: question, choices, answer (index); judged by likelihood",
    )
    exact_match: dict[str, str] = Field(
        default_factory=dict,
        description="JSONL files by name: prompt, answer; judged by greedy generation",
    )
    lm_eval: HarnessConfig | None = Field(None, description="tasks of lm-evaluation-harness")
    chat: bool = Field(False, description="put the tasks' questions through the chat template")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer, in tokens")
    generation_batch: int = Field(8, ge=1, description="prompts a rank answers at once")


class Config(_Record):
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
        "configs/deepspeed/zero3.json", description="a DeepSpeed JSON file; read, never rewritten"
    )
    provenance: dict[str, Any] = Field(
        default_factory=dict,
        exclude=True,
        description="written into the saved copy of a config, ignored when read",
    )

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        faults = _variant_faults(self.select, self.sft) + _sft_faults(self)
        if self.anchor_sources() and ANCHOR_SET in self.data.validation:
            faults.append(
                f"probe.anchor: its own files are prepared under the name {ANCHOR_SET}, which"
                " data.validation has too; rename the set there"
            )
        if faults:
            raise UserError(faults)
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
        path = Path(self.deepspeed)
        try:
            value = json.loads(path.read_text())
        except OSError:
            raise UserError(
                f"deepspeed: wanted a DeepSpeed JSON file; found none at {path}; give an existing"
                " path"
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"deepspeed: {path}:{error.lineno}: not valid JSON ({error.msg}); mend that line"
            ) from None
        if not isinstance(value, dict):
            raise UserError(
                f"deepspeed: {path}: wanted a JSON object; found {type(value).__name__}"
            )
        return value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `a.b=c` overrides (values in YAML), validate.

    Raises UserError listing every fault.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(
            f"{path}: wanted a configuration file; {error.strerror or error}; give the path of a"
            " YAML file"
        ) from None
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: wanted a mapping of keys; found"
            f" {'an empty file' if tree is None else type(tree).__name__}"
        )
    faults = []
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            faults.append(f"--set {item}: wanted key=value, for instance select.budget=0.1")
            continue
        fault = _assign(tree, key.strip().split("."), value, item)
        if fault:
            faults.append(fault)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        faults += [_fault(item, Config) for item in error.errors()]
        # a faulty section has been reported already
        with contextlib.suppress(ValidationError, TypeError):
            faults += _variant_faults(
                SelectConfig(**tree.get("select", {})), SftConfig(**tree.get("sft", {}))
            )
        raise UserError(faults) from None
    except UserError as error:
        raise UserError(faults + error.faults) from None
    if faults:
        raise UserError(faults)
    return config


def _variant_faults(select: SelectConfig, sft: SftConfig) -> list[str]:
    faults = []
    for name, changes in select.variants.items():
        where = f"select.variants.{name}"
        if not _NAME.fullmatch(name) or name in RESERVED_VARIANTS:
            faults.append(
                f"{where}: the name must be letters, digits, '_', '-' or '.', and none of"
                f" {RESERVED_VARIANTS}"
            )
        if "variants" in changes:
            faults.append(f"{where}.variants: a variant has no variants of its own; remove the key")
            continue
        try:
            select.resolve(name)
        except ValidationError as error:
            faults += [_fault(item, SelectConfig, prefix=where) for item in error.errors()]
    known = [*BUILTIN_VARIANTS, *select.variants]
    for name in sft.variants:
        if name not in known:
            faults.append(
                f"sft.variants: {name!r} is neither full nor one of"
                f" select.variants{_nearest(name, known)}"
            )
    return faults


def _sft_faults(config: Config) -> list[str]:
    faults, sft = [], config.sft
    if sft.replay and not config.data.replay:
        faults.append(
            "sft.replay: wanted general rows in data.replay to draw from; found none; add them or"
            " set it to 0"
        )
    chosen_by = [
        config.select.weights,
        *(changes.get("weights") for changes in config.select.variants.values()),
    ]
    if sft.weights and not {"inverse_density", "preference"} & set(chosen_by):
        faults.append(
            "sft.weights: wanted select.weights to be inverse_density or preference; found none,"
            " under which all samples count alike; set select.weights"
        )
    if sft.adapter and config.model.lora is None:
        faults.append(
            "sft.adapter: wanted model.lora, whose adapter it writes; found null; set model.lora or"
            " sft.adapter to false"
        )
    if sft.sequence_parallel > 1 and config.model.attention == "eager":
        faults.append(
            "sft.sequence_parallel: wanted model.attention to be sdpa or flash_attention_2; found"
            " eager, which DeepSpeed's Ulysses does not know; set model.attention"
        )
    if sft.sequence_parallel > 1 and sft.packing:
        faults.append(
            "sft.packing: wanted false with sft.sequence_parallel, whose attention keeps no packed"
            " samples apart; found true; set one of them back"
        )
    watched = sft.early_stopping.set if sft.early_stopping else None
    if watched is not None and watched not in config.data.validation:
        names = list(config.data.validation)
        faults.append(
            f"sft.early_stopping.set: {watched!r} is not one of"
            f" data.validation{_nearest(watched, names)}"
        )
    return faults


def _assign(tree: dict[str, Any], keys: list[str], text: str, item: str) -> str | None:
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            return f"--set {item}: {key} holds a value, not a group of keys"
        node = child
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        return f"--set {item}: the value is not valid YAML; quote it"
    return None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML's own rule; PyYAML keeps the last one
    silently).
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice; remove one", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def _fault(item: Any, root: type[BaseModel], prefix: str = "") -> str:
    """One pydantic error as: dotted key, wanted, found, change."""
    loc = [str(part) for part in item["loc"]]
    # union branches ('float', 'literal[...]', 'list[str]', 'function-...') are pydantic's, not the
    # user's keys
    keys = [
        part
        for part in loc
        if not re.fullmatch(r"(float|int|str|list\[.*|literal\[.*|function.*|constrained.*)", part)
    ]
    key = ".".join(([prefix] if prefix else []) + keys) or "(top level)"
    if item["type"] == "extra_forbidden":
        names = _field_names(root, keys[:-1])
        return f"{key}: unknown key{_nearest(keys[-1], names)}"
    if item["type"] == "missing":
        return f"{key}: missing; add it"
    message = item["msg"].removeprefix("Value error, ")
    found = item.get("input")
    shown = "" if isinstance(found, (dict, list)) or "found" in message else f"; found {found!r}"
    return f"{key}: {message}{shown}"


def _field_names(model: type[BaseModel], keys: list[str]) -> list[str]:
    for key in keys:
        field = model.model_fields.get(key)
        if field is None:
            return []
        inner = [
            t
            for t in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(t, type)
        ]
        models = [t for t in inner if issubclass(t, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid here: {', '.join(names)}" if names else ""
