"""How a training is getting on, step by step: a bar for people, beats for the supervisor.

Reads the trainer's state; prints on rank 0; writes to the supervisor's pipe.
"""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from grads_ds.distributed import heartbeat, step_timing


class StepBar(TrainerCallback):
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


class StepBeats(TrainerCallback):
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

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            heartbeat.logged(state.global_step, float(logs["loss"]))

    def on_substep_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        heartbeat.beat(self.what, state.global_step, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        for handle in self.timed:
            handle.remove()
