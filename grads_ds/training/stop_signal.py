"""A training that is told to stop keeps what it has: SIGTERM, SIGUSR1 or SIGHUP ends it after the
current optimizer step with a checkpoint, and the process with status 143.

The ranks agree after every step (one number all-reduced), since the signal reaches them at
different times and a checkpoint is everybody's. Whoever sends the signal decides how long it waits;
a rank that has not left GRACE_SECONDS later leaves without the checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from grads_ds.distributed import heartbeat, ranks
from grads_ds.distributed.device import device

GRACE_SECONDS = 110.0  # Slurm's own notice is often two minutes
STATUS = 143  # 128 + SIGTERM


class StopSignal(TrainerCallback):
    """Ends the training with a checkpoint once any rank was told to stop; `stopped` says so."""

    def __init__(self) -> None:
        self.stopped = False
        self._told = 0
        self._before: dict[int, Any] = {}
        self._leave: threading.Timer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """From here on a signal is noted instead of ending the process."""
        if threading.current_thread() is not threading.main_thread():
            return  # somebody's own loop in a thread, where no handler can be set
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks all ranks; if one was told to stop, all save and stop."""
        told = torch.tensor(self._told, device=device())
        if ranks.world() > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        if told.item() and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True
            args.load_best_model_at_end = False  # the next start asks for it
            heartbeat.beat("told to stop: writing a checkpoint")

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._leave is not None:
            self._leave.cancel()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._told:
            self._told = 1
            self._leave = threading.Timer(GRACE_SECONDS, os._exit, (STATUS,))
            self._leave.daemon = True
            self._leave.start()
