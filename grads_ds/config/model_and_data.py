"""Sections `model` and `data`: the model to adapt, the pool to choose from, the held-out sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from grads_ds.config.record import NAME, Record, expanded

# name of a row format -> what its rows look like; the order in which they are recognised
DATA_FORMATS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...]",
    "alpaca": "instruction, input, output",
    "prompt_completion": "prompt, completion",
    "text": "text",
    "prompt_completion_text": "prompt, completion as texts",
}
ASKED_FOR = ("prompt_completion_text",)  # formats that data.format alone can name
if TYPE_CHECKING:
    _Format = str
else:
    _Format = Literal[("auto", *DATA_FORMATS)]


class LoraConfig(Record):
    """Low-rank adapters (PEFT) instead of full-parameter training."""

    r: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(
        32.0, gt=0, description="scale of the adapters (alpha / r multiplies their output)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout on the adapters' input during training"
    )
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="module names, or 'all-linear'"
    )
    rslora: bool = Field(
        False, description="rank-stabilised: alpha over the root of r multiplies the output"
    )
    dora: bool = Field(
        False, description="magnitude and direction of each weight are trained apart (DoRA)"
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="modules trained whole beside the adapters, e.g. [lm_head, embed_tokens]"
    )
    load_in_4bit: bool = Field(
        False,
        description="the base's linear layers are held in 4 bits while the adapters train (QLoRA);"
        " on GPUs, with bitsandbytes installed",
    )


class ModelConfig(Record):
    """The model to adapt."""

    path: str = Field(description="a Hugging Face folder or hub id")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of weights and activations"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="attention implementation; auto takes the fastest that is installed and that"
        " the model knows",
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


class DataConfig(Record):
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
    format: _Format = Field(
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

    @field_validator("train", "replay", mode="before", json_schema_input_type=str | list[str])
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
            if not NAME.fullmatch(name) or name in ("pool", "replay", "prepared.json"):
                raise ValueError(
                    f"the set name {name!r} must be letters, digits, '_', '-' or '.', and none of"
                    " 'pool', 'replay' and 'prepared.json'"
                )
        return value

    def validation_sources(self) -> dict[str, list[str]]:
        """The held-out sets, each as a list of sources."""
        return {
            name: [src] if isinstance(src, str) else list(src)
            for name, src in self.validation.items()
        }
