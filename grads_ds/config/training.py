"""Section `sft`, and the settings that it shares with the probe's preliminary training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from grads_ds.config.frontier_variants import is_frontier
from grads_ds.config.record import NO_RESULT, Record
from grads_ds.config.trainer_options import TrainerOptions


class TrainingConfig(Record):
    """Optimisation settings shared by the preliminary phase and SFT."""

    epochs: float = Field(3.0, ge=0, description="passes over the training rows; may be a fraction")
    learning_rate: float = Field(1.0e-5, gt=0, description="peak learning rate")
    batch_size: int = Field(32, ge=1, description="samples per optimizer step, over all ranks")
    micro_batch_size: int = Field(
        4, ge=1, description="samples per rank and forward pass (at most)"
    )
    lr_scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field(
        "cosine",
        description="decay of the learning rate; its settings are sft.trainer.lr_scheduler_kwargs",
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps spent warming up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass"
    )
    checkpoint_steps: int = Field(
        500,
        ge=1,
        description="optimizer steps between resumable checkpoints",
        json_schema_extra=NO_RESULT,
    )
    checkpoints_kept: int = Field(
        2,
        ge=1,
        description="finished checkpoints kept while training; older ones are removed",
        json_schema_extra=NO_RESULT,
    )


class EarlyStoppingConfig(Record):
    """When fine-tuning ends before its last step; the model kept is that of the lowest held-out
    loss.
    """

    set: str = Field("domain", description="the set of data.validation whose loss is watched")
    every: int = Field(
        50, ge=1, description="optimizer steps between two evaluations, each with a checkpoint"
    )
    patience: int = Field(
        3, ge=1, description="evaluations without improvement after which training ends"
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
    token_gate: Literal["none", "stm", "eaft", "flow"] = Field(
        "none",
        description=(
            "target tokens count by what the base model says of them: stm leaves out those it finds"
            " unlikely, eaft weighs by its uncertainty, flow weighs samples by exp(-loss)"
        ),
    )
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training rows that are drawn from data.replay; 0.1 is one in ten",
    )
    early_stopping: EarlyStoppingConfig | None = Field(None, description="null trains all steps")
    trainer: TrainerOptions = Field(
        default_factory=TrainerOptions, description="further settings of transformers' trainer"
    )
    snapshots: list[float] = Field(
        default_factory=list,
        description=(
            "shares of the steps, within 0 and 1, after which the model is also written and"
            " evaluated: is it better to stop earlier?"
        ),
    )
    frontier: bool | list[float] = Field(
        False,
        description=(
            "also train random subsets, which every other model is compared with at the same gain:"
            " true, or budgets as fractions below 1; the whole pool with them"
        ),
        json_schema_extra=NO_RESULT,
    )

    @field_validator("frontier", "snapshots")
    @classmethod
    def _fractions(cls, value: bool | list[float]) -> bool | list[float]:
        for budget in value if isinstance(value, list) else []:
            if not 0 < budget < 1:
                raise ValueError(f"wanted fractions above 0 and below 1; found {budget:g}")
        return value

    def followed(self, names: list[str]) -> list[str]:
        """Of the trained models those that are also looked at on their way and between them and the
        base: all but the frontier's.
        """
        return [name for name in names if not is_frontier(name)]
