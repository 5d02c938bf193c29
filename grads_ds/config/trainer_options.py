"""Section `sft.trainer`: what of transformers' TrainingArguments can be set, and why not the rest.

Every name of TrainingArguments (transformers 5.23) is a field of the record or has its reason in
`REFUSED`; a test compares both with the installed release. No torch import.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from grads_ds.config.errors import nearest
from grads_ds.config.record import NO_RESULT, Record

BITSANDBYTES = (
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "ademamix")
    + ("ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_8bit", "lion_32bit")
    + ("paged_lion_8bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit")
    + ("rmsprop_bnb_32bit",)
)
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop")
_SHAPES = "it works on whole matrices, and ZeRO hands the optimizer flat pieces of them"
_STEPS = "it steps inside the backward pass, before ZeRO has reduced the gradients"
_MODES = "it has to be switched between training and evaluation, and DeepSpeed's wrapper does not"
REFUSED_OPTIMIZERS = {
    **dict.fromkeys(
        ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _SHAPES
    ),
    **dict.fromkeys(
        ("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise")
        + ("apollo_adamw_layerwise", "lomo", "adalomo"),
        _STEPS,
    ),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _MODES),
    **dict.fromkeys(
        ("adamw_torch_4bit", "adamw_torch_8bit", "adamw_anyprecision", "grokadamw", "stable_adamw"),
        "it comes from a package that was never tried with ZeRO here",
    ),
    "adagrad": "DeepSpeed's ZeRO loses its parameter groups and fails in the first step (0.19.8)",
    **dict.fromkeys(("adamw_torch_xla", "adamw_torch_npu_fused"), "DeepSpeed here runs on CUDA"),
}
TRACKERS = ("wandb", "mlflow", "trackio")
_RUN_DIR = "a run writes to its run directory alone; publish sft/model yourself"
_SHARDING = "DeepSpeed shards and reduces; write it into the DeepSpeed file"
_JUDGED = "evaluation is a stage of its own (section evaluate); while training, sft.early_stopping"
_KEPT = "set sft.checkpoint_steps and sft.checkpoints_kept"
_COMMAND = "it belongs to transformers' own scripts; say it by the stages (--from, --to)"
_MODEL = "set model.dtype"
_BATCHES = "set sft.batch_size and sft.micro_batch_size"
_LOGS = "set TRANSFORMERS_VERBOSITY in the environment"


class TrainerOptions(Record):
    """Settings of transformers' trainer beyond the keys of sft: its own names and meanings; null
    leaves its default.
    """

    optim: str | None = Field(
        None,
        description=(
            f"the optimizer: {', '.join(PLAIN_OPTIMIZERS)}; on GPUs with bitsandbytes installed"
            f" also {', '.join(BITSANDBYTES)}"
        ),
    )
    optim_args: str | None = Field(None, description="its further settings, as name=value,...")
    adam_beta1: float | None = Field(None, ge=0, lt=1, description="AdamW's first decay")
    adam_beta2: float | None = Field(None, ge=0, lt=1, description="AdamW's second decay")
    adam_epsilon: float | None = Field(None, gt=0, description="AdamW's epsilon")
    lr_scheduler_kwargs: dict[str, Any] | None = Field(
        None, description="settings of the decay, e.g. {min_lr_rate: 0.1}"
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="noise on the embeddings while training (NEFTune)"
    )
    use_liger_kernel: bool | None = Field(
        None, description="fused kernels; needs a GPU and the package liger-kernel"
    )
    liger_kernel_config: dict[str, bool] | None = Field(None, description="which of them")
    seed: int | None = Field(None, ge=0, description="instead of the run's seed, in sft alone")
    data_seed: int | None = Field(None, ge=0, description="of the rows' order alone")
    full_determinism: bool | None = Field(
        None, description="deterministic kernels, where torch has them; slower"
    )
    tf32: bool | None = Field(None, description="TensorFloat-32 on GPUs that have it")
    activation_checkpointing_kwargs: dict[str, Any] | None = Field(
        None, description="with sft.gradient_checkpointing, e.g. {use_reentrant: false}"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] | None = Field(
        None, description="the order of the rows"
    )
    torch_empty_cache_steps: int | None = Field(
        None,
        ge=1,
        description="steps between emptying the GPU's cache",
        json_schema_extra=NO_RESULT,
    )
    logging_steps: int | None = Field(
        None, ge=1, description="steps between two logged losses", json_schema_extra=NO_RESULT
    )
    logging_first_step: bool | None = Field(
        None, description="also log the first", json_schema_extra=NO_RESULT
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list,
        description=(
            "trackers beside TensorBoard, which is always written; each is an extra to install:"
            " pip install 'grads-ds[wandb]'"
        ),
        json_schema_extra=NO_RESULT,
    )
    run_name: str | None = Field(
        None, description="the trackers' name of the run", json_schema_extra=NO_RESULT
    )
    project: str | None = Field(
        None, description="the trackers' name of the project", json_schema_extra=NO_RESULT
    )
    dataloader_num_workers: int | None = Field(
        None, ge=0, description="processes that read rows", json_schema_extra=NO_RESULT
    )
    dataloader_pin_memory: bool | None = Field(
        None, description="pinned memory for batches", json_schema_extra=NO_RESULT
    )
    dataloader_persistent_workers: bool | None = Field(
        None, description="keep the processes between epochs", json_schema_extra=NO_RESULT
    )
    dataloader_prefetch_factor: int | None = Field(
        None, ge=1, description="batches each process reads ahead", json_schema_extra=NO_RESULT
    )

    @field_validator("optim")
    @classmethod
    def _known_optimizer(cls, value: str | None) -> str | None:
        if reason := REFUSED_OPTIMIZERS.get(str(value)):
            raise ValueError(f"{value} cannot be used: {reason}; take another")
        known = (*PLAIN_OPTIMIZERS, *BITSANDBYTES)
        if value is not None and value not in known:
            raise ValueError(f"{value!r} is not an optimizer{nearest(value, known)}")
        return value

    REFUSED: ClassVar[dict[str, str]] = {
        "output_dir": "a run writes to run_dir",
        "per_device_train_batch_size": _BATCHES,
        "gradient_accumulation_steps": _BATCHES,
        "auto_find_batch_size": f"the batch size is part of the result; {_BATCHES}",
        "num_train_epochs": "set sft.epochs",
        "max_steps": "set sft.epochs, or sft.equal: steps",
        "learning_rate": "set sft.learning_rate",
        "lr_scheduler_type": "set sft.lr_scheduler",
        "warmup_steps": "set sft.warmup_ratio",
        "weight_decay": "set sft.weight_decay",
        "max_grad_norm": "set sft.max_grad_norm",
        "activation_checkpointing": "set sft.gradient_checkpointing",
        "gradient_checkpointing": "set sft.gradient_checkpointing",
        "gradient_checkpointing_kwargs": "set sft.trainer.activation_checkpointing_kwargs",
        "bf16": _MODEL,
        "fp16": _MODEL,
        "bf16_full_eval": _MODEL,
        "fp16_full_eval": _MODEL,
        "optim_target_modules": f"it is for optimizers that are refused: {_SHAPES}",
        "average_tokens_across_devices": "a step's loss is always the mean over all ranks' tokens",
        "label_smoothing_factor": (
            "transformers takes its mean over a micro-batch, not over the step's target tokens"
        ),
        "torch_compile": "a compiled model does not run ZeRO-3's hooks as they are checked here",
        "torch_compile_backend": "torch_compile is refused",
        "torch_compile_mode": "torch_compile is refused",
        "use_cache": "a training needs no cache, and packed rows must not have one",
        "logging_strategy": "set sft.trainer.logging_steps",
        "logging_nan_inf_filter": "a loss that is not finite is shown as it is",
        "log_on_each_node": "rank 0 narrates; every rank has its own log",
        "log_level": _LOGS,
        "log_level_replica": _LOGS,
        "disable_tqdm": "progress is grads-ds's own",
        "include_num_input_tokens_seen": "tokens are counted by prepare",
        "trackio_space_id": _RUN_DIR,
        "trackio_bucket_id": _RUN_DIR,
        "trackio_static_space_id": _RUN_DIR,
        **dict.fromkeys(
            ("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size")
            + ("prediction_loss_only", "eval_on_start", "eval_do_concat_batches")
            + ("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics")
            + ("batch_eval_metrics", "load_best_model_at_end", "metric_for_best_model")
            + ("greater_is_better",),
            _JUDGED,
        ),
        **dict.fromkeys(
            ("save_only_model", "save_strategy", "save_steps", "save_on_each_node")
            + ("save_total_limit", "enable_jit_checkpoint"),
            _KEPT,
        ),
        **dict.fromkeys(
            ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy")
            + ("hub_always_push", "hub_revision"),
            _RUN_DIR,
        ),
        "ignore_data_skip": "a resumed training would see rows twice and others never",
        "restore_callback_states_from_checkpoint": "it is always so",
        "resume_from_checkpoint": "a stage goes on from its last whole checkpoint by itself",
        "use_cpu": "GPUs are used where there are any",
        "accelerator_config": _SHARDING,
        "parallelism_config": "set sft.sequence_parallel",
        "dataloader_drop_last": "every chosen row is trained on",
        "dataloader_multiprocessing_context": "rows are read by forked processes",
        "dataloader_in_order": "the order of the rows is part of the result",
        "remove_unused_columns": "the rows hold what the trainer reads and nothing else",
        "label_names": "the rows' own: labels",
        "length_column_name": "lengths are those of input_ids",
        **dict.fromkeys(
            ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers")
            + ("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config"),
            _SHARDING,
        ),
        "deepspeed": "set deepspeed at the top level",
        "debug": "grads-ds takes every rank's stack when a run hangs",
        "skip_memory_metrics": "grads-ds status shows memory",
        **dict.fromkeys(("do_train", "do_eval", "do_predict", "local_rank"), _COMMAND),
    }

    def arguments(self) -> dict[str, Any]:
        """What is set, as arguments of TrainingArguments; report_to without TensorBoard."""
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        return given | {"report_to": [name for name in self.report_to if name in TRACKERS]}
