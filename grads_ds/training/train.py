"""Training: rows of tokens and settings -> a model folder, through transformers' Trainer on the
user's DeepSpeed config.

Serves the preliminary phase and SFT alike. Reads a prepared data set; writes resumable checkpoints
under a work folder while it trains (removed at the end), TensorBoard curves, and the trained model
as Hugging Face safetensors.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from grads_ds.config.config import Config
from grads_ds.config.errors import StoppedBySignal
from grads_ds.config.training import EarlyStoppingConfig, SftConfig, TrainingConfig
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.distributed import ranks
from grads_ds.engine.attention import attention_of
from grads_ds.engine.four_bit import four_bit_loading
from grads_ds.engine.lora import with_lora
from grads_ds.engine.model import load_model
from grads_ds.engine.model_folder import save_adapter, save_model
from grads_ds.engine.settings import training_settings
from grads_ds.training.checkpoint_content import tensors_alone
from grads_ds.training.checkpoints import Checkpoints, last_checkpoint
from grads_ds.training.division import micro_batch
from grads_ds.training.packing import PackingCheck, PackingCollator
from grads_ds.training.resize import make_universal, needs_universal
from grads_ds.training.sequence_parallel import SequenceTrainer, SliceCollator, sequence_parallel
from grads_ds.training.step_progress import StepBar, StepBeats
from grads_ds.training.stop_signal import StopSignal
from grads_ds.training.trainer import Collator, SftTrainer
from grads_ds.workarounds import close


def optimizer_steps(rows: int, settings: TrainingConfig) -> int:
    """How many optimizer steps `settings.epochs` passes over `rows` samples are (at least one)."""
    return max(1, math.ceil(rows * settings.epochs / settings.batch_size))


def warmup_steps(steps: int, settings: TrainingConfig) -> int:
    """How many of the steps warm up, fewer than all: the first of them has a rate of 0, and a
    training of a single step would learn nothing.
    """
    return min(math.ceil(steps * settings.warmup_ratio), steps - 1)


@dataclass(frozen=True)
class TrainingJob:
    """One training. `rows` has columns input_ids, labels and, where samples count differently,
    weight.

    Args:
        config: the run's config; model, dtype, seed and DeepSpeed settings come from it.
        settings: the section of it that this training follows.
        rows: the samples, by index.
        model_path: the model to begin with.
        model_dir: receives the trained model.
        work_dir: holds the checkpoints while it trains; removed at the end.
        log_dir: receives TensorBoard curves.
        steps: optimizer steps.
        what: what the log calls it.
        identity: digest of what the result depends on; checkpoints of another are not gone on from.
        callbacks: more of them, each called on every rank.
        early_stopping: ends the training once the loss on `held_out` no longer falls; the model is
            that of its lowest loss.
        held_out: the rows of early stopping.
        packing: the samples of a micro-batch share rows.
        card: the text of the model's README.md.
        adapter_dir: receives the LoRA adapter by itself, beside the merged model.
        sequence: how many ranks share each sample's tokens.
    """

    config: Config
    settings: TrainingConfig
    rows: Any
    model_path: str | Path
    model_dir: Path
    work_dir: Path
    log_dir: Path
    steps: int
    what: str
    identity: str
    callbacks: Sequence[TrainerCallback] = ()
    early_stopping: EarlyStoppingConfig | None = None
    held_out: Any = None
    packing: bool = False
    card: str | None = None
    adapter_dir: Path | None = None
    sequence: int = 1


def train_model(job: TrainingJob) -> None:
    """Train the job's model for its steps and write it to `model_dir`. Every rank calls this.

    Resumes from the last whole checkpoint of the same identity in `work_dir`, if there is one.
    Raises UserError when packed samples would see each other or a tensor of the model is not as it
    must be, StoppedBySignal when a signal ended it and its checkpoint is written.
    """
    config = job.config
    checkpoint = last_checkpoint(job.work_dir, job.identity)
    universal = checkpoint is not None and needs_universal(checkpoint)
    if checkpoint is not None and universal:
        make_universal(checkpoint)
    # entered before anything can fail: what Ulysses puts into the process is taken out again
    with contextlib.ExitStack() as stack:
        sharing = None
        if job.sequence > 1:
            sharing = stack.enter_context(sequence_parallel(job.sequence, attention_of(config)))
        arguments = _arguments(job, sharing, universal)
        # new adapters are drawn at random: every training of a seed begins with the same ones
        set_seed(arguments.seed)
        model = load_model(config, job.model_path, **four_bit_loading(config.model))
        if config.model.lora is not None:
            model = with_lora(model, config.model.lora)
        stop = StopSignal()
        trainer = _trainer(job, model, arguments, stop, stack)
        with tensors_alone():  # of the checkpoint it goes on from, and of the best one at the end
            trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        step = trainer.state.global_step
        raise StoppedBySignal(f"{job.what}: told to stop; checkpoint-{step} is written")
    module = trainer.accelerator.unwrap_model(trainer.model)
    if job.adapter_dir is not None:
        save_adapter(module, config, job.adapter_dir)
    save_model(module, config, job.model_dir, job.card)
    engine = trainer.deepspeed
    if engine is not None:
        close(engine)
    del trainer, engine, model, module
    ranks.barrier()
    if ranks.is_main():
        shutil.rmtree(job.work_dir, ignore_errors=True)


def _arguments(
    job: TrainingJob, sharing: ParallelismConfig | None, universal: bool
) -> TrainingArguments:
    """transformers' arguments. `sharing`: how ranks share tokens; `universal`: the checkpoint to go
    on from was rewritten.
    """
    settings, early_stopping = job.settings, job.early_stopping
    readers = ranks.world() // job.sequence  # ranks, or groups of them, that read rows of their own
    micro = micro_batch(settings, readers)
    settings_json = training_settings(job.config)
    if universal:
        settings_json.setdefault("checkpoint", {})["load_universal"] = True
    if job.sequence > 1:
        # transformers takes every rank for a reader; accelerate puts it right
        settings_json["train_batch_size"] = "auto"
    values: dict[str, Any] = {
        "output_dir": str(job.work_dir),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings.batch_size // readers // micro,
        "max_steps": job.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": warmup_steps(job.steps, settings),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "activation_checkpointing": settings.gradient_checkpointing,
        "bf16": job.config.model.dtype == "bfloat16",
        "fp16": job.config.model.dtype == "float16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.config.seed,
        "data_seed": job.config.seed,
        "deepspeed": settings_json,
        "parallelism_config": sharing,
        "save_strategy": "steps",
        "save_steps": early_stopping.every if early_stopping else settings.checkpoint_steps,
        "eval_strategy": "steps" if early_stopping else "no",
        "eval_steps": early_stopping.every if early_stopping else None,
        "load_best_model_at_end": early_stopping is not None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has been waiting
        "logging_strategy": "steps",
        "logging_steps": max(1, job.steps // 100),
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    chosen = settings.trainer.arguments() if isinstance(settings, SftConfig) else {}
    if "seed" in chosen:
        values["data_seed"] = chosen["seed"]
    return TrainingArguments(**(values | chosen))


def _trainer(
    job: TrainingJob,
    model: Any,
    arguments: TrainingArguments,
    stop: StopSignal,
    stack: contextlib.ExitStack,
) -> Any:
    """The trainer with its rows, collator and callbacks; `stack` closes its TensorBoard writer."""
    config, early_stopping = job.config, job.early_stopping
    writer = SummaryWriter(str(job.log_dir)) if ranks.is_main() else None
    if writer is not None:
        stack.callback(writer.close)
    pad = load_tokenizer(config.model).pad_token_id or 0
    collator: Collator = PackingCollator(config, pad) if job.packing else Collator(pad)
    if job.sequence > 1:
        collator = SliceCollator(pad, job.sequence)
    stopping = (
        [EarlyStoppingCallback(early_stopping.patience, early_stopping.min_delta)]
        if early_stopping
        else []
    )
    trainer = (SequenceTrainer if job.sequence > 1 else SftTrainer)(
        model=model,
        args=arguments,
        train_dataset=job.rows,
        eval_dataset=job.held_out,
        data_collator=collator,
        callbacks=[
            Checkpoints(job.settings.checkpoints_kept, job.identity),
            *stopping,
            *([PackingCheck(collator, job.rows)] if job.packing else []),
            StepBeats(job.what),
            *([StepBar(job.what), TensorBoardCallback(writer)] if writer else []),
            *job.callbacks,
            stop,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
