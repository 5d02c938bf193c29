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
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from grads_ds.config.config import Config
from grads_ds.config.training import EarlyStoppingConfig, TrainingConfig
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.distributed import heartbeat, ranks, step_timing
from grads_ds.engine.attention import attention_of
from grads_ds.engine.lora import with_lora
from grads_ds.engine.model import load_model
from grads_ds.engine.model_folder import save_adapter, save_model
from grads_ds.engine.settings import training_settings
from grads_ds.training.checkpoints import (
    Checkpoints,
    last_checkpoint,
    make_universal,
    needs_universal,
)
from grads_ds.training.division import micro_batch
from grads_ds.training.packing import PackingCheck, PackingCollator
from grads_ds.training.sequence_parallel import SequenceTrainer, SliceCollator, sequence_parallel
from grads_ds.training.trainer import Collator, SftTrainer
from grads_ds.workarounds import close


def optimizer_steps(rows: int, settings: TrainingConfig) -> int:
    """How many optimizer steps `settings.epochs` passes over `rows` samples are (at least one)."""
    return max(1, math.ceil(rows * settings.epochs / settings.batch_size))


def train_model(
    config: Config,
    settings: TrainingConfig,
    rows: Any,
    model_path: str | Path,
    model_dir: Path,
    work_dir: Path,
    log_dir: Path,
    steps: int,
    what: str,
    callbacks: Sequence[TrainerCallback] = (),
    early_stopping: EarlyStoppingConfig | None = None,
    held_out: Any = None,
    packing: bool = False,
    card: str | None = None,
    adapter_dir: Path | None = None,
    sequence: int = 1,
) -> None:
    """Train the model at `model_path` on `rows` for `steps` and write it to `model_dir`.

    `rows` has columns input_ids, labels and, where samples count differently, weight. With
    `early_stopping`, training ends once the loss on the rows `held_out` no longer falls, and the
    model is that of its lowest loss. With `packing` the samples of a micro-batch share rows; with
    `sequence` above 1 so many ranks share each sample's tokens. `card` is the text of the model's
    README.md; `adapter_dir` receives the LoRA adapter by itself, beside the merged model. Raises
    UserError when packed samples would see each other. Resumes from the last finished checkpoint in
    `work_dir`, if there is one. Every rank calls this.
    """
    readers = ranks.world() // sequence  # ranks, or groups of them, that read rows of their own
    micro = micro_batch(settings, readers)
    settings_json, checkpoint = training_settings(config), last_checkpoint(work_dir)
    if checkpoint and needs_universal(checkpoint):
        make_universal(checkpoint)
        settings_json.setdefault("checkpoint", {})["load_universal"] = True
    if sequence > 1:
        settings_json["train_batch_size"] = (
            "auto"  # transformers takes every rank for a reader; accelerate puts it right
        )
    sharing = contextlib.ExitStack()
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // readers // micro,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=math.ceil(steps * settings.warmup_ratio),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        bf16=config.model.dtype == "bfloat16",
        fp16=config.model.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        deepspeed=settings_json,
        parallelism_config=(
            sharing.enter_context(sequence_parallel(sequence, attention_of(config)))
            if sequence > 1
            else None
        ),
        save_strategy="steps",
        save_steps=early_stopping.every if early_stopping else settings.checkpoint_steps,
        eval_strategy="steps" if early_stopping else "no",
        eval_steps=early_stopping.every if early_stopping else None,
        load_best_model_at_end=early_stopping is not None,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has been waiting
        logging_strategy="steps",
        logging_steps=max(1, steps // 100),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    # new adapters are drawn at random: every training of a seed begins with the same ones
    set_seed(config.seed)
    model = load_model(config, model_path)
    if config.model.lora is not None:
        model = with_lora(model, config.model.lora)
    writer = SummaryWriter(str(log_dir)) if ranks.is_main() else None
    pad = load_tokenizer(config.model).pad_token_id
    collator: Collator = PackingCollator(config, pad or 0) if packing else Collator(pad or 0)
    if sequence > 1:
        collator = SliceCollator(pad or 0, sequence)
    stopping = (
        [EarlyStoppingCallback(early_stopping.patience, early_stopping.min_delta)]
        if early_stopping
        else []
    )
    trainer = (SequenceTrainer if sequence > 1 else SftTrainer)(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[
            Checkpoints(settings.checkpoints_kept),
            *stopping,
            *([PackingCheck(collator, rows)] if packing else []),
            _Beats(what),
            *([_Progress(what), TensorBoardCallback(writer)] if writer else []),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with sharing:
        trainer.train(resume_from_checkpoint=checkpoint)
    if writer:
        writer.close()
    module = trainer.accelerator.unwrap_model(trainer.model)
    if adapter_dir is not None:
        save_adapter(module, config, adapter_dir)
    save_model(module, config, model_dir, card)
    engine = trainer.deepspeed
    if engine is not None:
        close(engine)
    del trainer, engine, model, module
    ranks.barrier()
    if ranks.is_main():
        shutil.rmtree(work_dir, ignore_errors=True)


class _Progress(TrainerCallback):
    """One progress bar on rank 0 with the last logged loss."""

    def __init__(self, what: str):
        self.what = what

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.what, unit="step"
        )

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self.bar.close()


class _Beats(TrainerCallback):
    """Tells every rank's supervisor that the rank advances, and how long its own work takes."""

    def __init__(self, what: str):
        self.what = what

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        self.timed = step_timing.attach(model)  # the engine stands by now

    def on_step_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        heartbeat.beat(self.what, state.global_step, state.max_steps)

    def on_substep_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        heartbeat.beat(self.what, state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        for handle in self.timed:
            handle.remove()
