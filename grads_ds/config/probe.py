"""Section `probe`: the preliminary phase and the recording of gradient norms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from grads_ds.config.columns import (
    EXTRA_COLUMNS,
    EXTRAS,
    GROUP,
    KEYS_OF_EXTRAS,
    LAYER_GROUPS,
    wants_reference,
)
from grads_ds.config.errors import nearest
from grads_ds.config.record import NO_RESULT, expanded
from grads_ds.config.training import TrainingConfig


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
            f"parameter groups whose norms are recorded: any of {', '.join(LAYER_GROUPS)}, or all;"
            " [] records losses and the extras that want no gradient, without a backward"
        ),
    )
    tokens_per_microbatch: Annotated[int, Field(ge=8)] | Literal["auto"] = Field(
        16384,
        description=(
            "tokens of one frozen micro-batch per rank, padding included; auto: as many as fit,"
            " measured with the pool's longest sample"
        ),
        json_schema_extra=NO_RESULT,
    )
    shard_within: Literal["world", "host", "auto"] = Field(
        "world",
        description=(
            "whose ranks share out the parameters while recording and evaluating under ZeRO-3:"
            " all, or those of one host, so that no parameter crosses between hosts; auto: host"
            " where a host's memory holds the model twice over"
        ),
        json_schema_extra=NO_RESULT,
    )
    recompute_layers: int | None = Field(
        None,
        ge=0,
        description=(
            "with gradient_checkpointing: how many layers, from the first, the recording computes"
            " again; null: all"
        ),
        json_schema_extra=NO_RESULT,
    )
    flush_seconds: float = Field(
        5.0,
        ge=0,
        description="scores at most this old are lost with a killed rank (or 2 % of a long pass)",
        json_schema_extra=NO_RESULT,
    )
    loss_reduction: Literal["mean", "sum"] = Field(
        "mean", description="a sample's loss is the mean or the sum over its target tokens"
    )
    extras: list[str] = Field(
        default_factory=list,
        description=(
            f"further columns of the score table: any of {', '.join(EXTRAS)} (docs/selection.md)"
        ),
    )
    anchor: str | list[str] | None = Field(
        None,
        description=(
            "the reference set of extras anchor, contrast, hidden and fisher: a set of"
            " data.validation by name, or files, folders or hub ids of its own"
        ),
    )
    other_prompts: int = Field(
        1, ge=1, le=8, description="extras prompt_gain: other rows' prompts that each row is put to"
    )
    contrast_rows: int = Field(
        256, ge=2, description="extras contrast, hidden: pool rows behind the pool's mean, drawn"
    )
    controls: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description=(
            "share of the pool scored once more as controls: with swapped answers, and as much"
            " general text; never selected or trained on"
        ),
    )

    def training_inputs(self) -> dict[str, Any]:
        """The keys that the preliminary training depends on, as plain values."""
        return self.inputs(exclude=self._of_the_recording())

    def recording_inputs(self) -> dict[str, Any]:
        """The keys that the recording depends on besides, as plain values: all that the section has
        for itself. Without extras theirs are left out, and `controls` where there are none.
        """
        found = self.inputs(exclude=type(self).model_fields.keys() - self._of_the_recording())
        unused = set() if self.extras else {"extras", *KEYS_OF_EXTRAS}
        unused |= set() if self.controls else {"controls"}
        return {name: value for name, value in found.items() if name not in unused}

    @classmethod
    def _of_the_recording(cls) -> set[str]:
        """Every key that trainings have not in common: a new one is not forgotten."""
        return cls.model_fields.keys() - TrainingConfig.model_fields.keys() - {"record"}

    @field_validator("anchor", mode="before")
    @classmethod
    def _anchor_is_expanded(cls, value: Any) -> Any:
        return expanded(value)

    @field_validator("extras")
    @classmethod
    def _known_extras(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in EXTRAS:
                raise ValueError(f"{name!r} is not an extra column{nearest(name, EXTRAS)}")
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _extras_fit(self) -> ProbeConfig:
        if wants_reference(self.extras) != (self.anchor is not None):
            raise ValueError(
                "extras that are taken against a reference set (anchor, contrast, hidden, fisher)"
                " and anchor: SET want each other; found one alone; give both or neither"
            )
        if "early" in self.extras and self.epochs == 0:
            raise ValueError(
                "extras early compares with the model before training; found epochs 0; set epochs"
                " above 0"
            )
        if (self.extras or self.controls) and self.record == "during" and self.epochs > 0:
            raise ValueError(
                "extras and controls are recorded on frozen weights; found record: during; set"
                " record: after"
            )
        return self

    @model_validator(mode="after")
    def _without_layers(self) -> ProbeConfig:
        """What layers: [] leaves nothing of is refused."""
        if self.layers:
            return self
        of_groups = dict.fromkeys(
            column.extra
            for column in EXTRA_COLUMNS
            if GROUP in column.name and column.extra in self.extras
        )
        if of_groups:
            raise ValueError(
                f"extras {', '.join(of_groups)} are recorded per layer group; found layers: [];"
                " name groups in layers, or leave these out"
            )
        if self.record == "during" and self.epochs > 0:
            raise ValueError(
                "record: during records the norms of layers; found layers: []; name groups, or set"
                " record: after"
            )
        return self

    @field_validator("layers", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _known_groups(cls, value: Any) -> Any:
        if value == "all" or value == ["all"]:
            return "all"
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list):
            raise ValueError(f"wanted a list of {', '.join(LAYER_GROUPS)}, or all")
        for name in names:
            if name not in LAYER_GROUPS:
                raise ValueError(
                    f"{name!r} is not a layer group{nearest(str(name), [*LAYER_GROUPS, 'all'])}"
                )
        return list(dict.fromkeys(names))
