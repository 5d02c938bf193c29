"""The trainer of both trainings: transformers' own, with the loss, the held-out loss and the
checkpoints this project promises.

The loss of an optimizer step is the mean cross-entropy over the step's target tokens, over all
ranks and accumulation steps together; with weights w, sum(w_t * ce_t) / sum(w_t) over the target
tokens t, where w_t is the sample's weight, the token's own, or their product; where all weights of
a step are 0, its loss is 0. Evaluation's loss of a set is the plain
mean over the set, and the probe's losses are each sample's own. Reads rows and checkpoints, writes
checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from grads_ds.data.collate import IGNORE_INDEX, pad_batch
from grads_ds.distributed import heartbeat, ranks
from grads_ds.distributed.step_timing import Read
from grads_ds.training.resize import make_universal

WEIGHTS = "loss_weights"  # float32 [B, T] in a batch whose samples or tokens count differently


class Collator:
    """Rows (input_ids, labels, and weight where they count differently: a number, or one for each
    token) -> one right-padded batch of tensors.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id  # any token will do: padding is masked and has no target

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {
            key: torch.from_numpy(value) for key, value in pad_batch(rows, self.pad_id).items()
        }
        if rows and "weight" in rows[0]:
            weights = np.zeros(batch["labels"].shape, np.float32)
            for line, row in enumerate(rows):
                weights[line, : len(row["input_ids"])] = row["weight"]
            batch[WEIGHTS] = torch.from_numpy(weights)
        return batch


def target_weights(batch: dict[str, Tensor]) -> Tensor:
    """How much each position's target counts, float32 [B, T - 1]: 0 where there is none."""
    targets = batch["labels"][:, 1:] != IGNORE_INDEX
    return targets * batch[WEIGHTS][:, 1:] if WEIGHTS in batch else targets.float()


def weighted_loss(logits_BTV: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Sum over target tokens of weight times cross-entropy (nats), in float32 as the models' own
    losses are.
    """
    ce = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    return (ce * target_weights(batch).flatten()).sum()


class SftTrainer(Trainer):
    """transformers' Trainer with weighted samples and an exact held-out loss."""

    control: Any
    deepspeed: Any
    weights = staticmethod(target_weights)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The step's micro-batches and what its loss is divided by: its number of target tokens, or
        their weight.
        """
        batches, divisor = super().get_batch_samples(Read(epoch_iterator), num_batches, device)
        if batches and (divisor is None or WEIGHTS in batches[0]):
            total = (
                torch.stack([self.weights(batch).sum(dtype=torch.float64) for batch in batches])
                .sum()
                .to(device)
            )
            divisor = all_reduced(total)
            divisor = torch.where(divisor > 0, divisor, 1.0)  # all weights 0: the loss is 0
        return batches, divisor

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the ranks, by which DeepSpeed divides
        the gradients.
        """
        # packed rows, which transformers keeps apart only without a cache
        if "position_ids" in inputs:
            inputs = {**inputs, "use_cache": False}
        if WEIGHTS not in inputs or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in (WEIGHTS, "labels")}
        )
        loss = weighted_loss(outputs.logits, inputs) * ranks.world() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The held-out loss as evaluation defines it, logged as `eval_loss`.

        Every rank takes part.
        """
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        loss = held_out_loss(
            self.model, rows, self.args.per_device_train_batch_size, self.data_collator.pad_id
        )
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: a checkpoint is the engine's own, from which alone it is resumed; the model's
        export follows the training.

        transformers (seen with 5.23) writes a model into each checkpoint besides: below ZeRO-3 a
        whole copy, made in the host memory of every rank; under ZeRO-3 the engine's checkpoint a
        second time, or with stage3_gather_16bit_weights_on_model_save the whole model out of rank
        0's memory.
        """

    # private to transformers (seen with 5.23): there is no public place before it
    def _load_best_model(self) -> None:
        if self.deepspeed is not None and self.deepspeed.load_universal_checkpoint():
            make_universal(self.state.best_model_checkpoint)  # this engine reads no other kind
        super()._load_best_model()


def held_out_loss(model: nn.Module, rows: Any, micro_batch: int, pad_id: int) -> float:
    """Mean cross-entropy over the target tokens of `rows` (nats), the same number on every rank.

    All ranks take the same number of steps (ZeRO-3 runs in lockstep): one without rows left feeds a
    row without targets.
    """
    mine = sorted(
        range(ranks.rank(), len(rows), ranks.world()), key=lambda i: len(rows[i]["input_ids"])
    )
    steps = -(-len(rows) // (micro_batch * ranks.world()))
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for step in range(steps):
            heartbeat.beat("held-out loss", step, steps)
            chosen = mine[step * micro_batch : (step + 1) * micro_batch]
            batch = {
                k: torch.from_numpy(v).to(device)
                for k, v in pad_batch([rows[i] for i in chosen], pad_id).items()
            }
            mean = model(**batch).loss
            count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
            if chosen:
                sums += torch.stack([mean.double() * count, count.double()])
    model.train(was_training)
    total, count = all_reduced(sums).tolist()
    return float(np.divide(total, count))


def all_reduced(value: Tensor) -> Tensor:
    """The sum over all ranks, in place of the value."""
    if ranks.world() > 1:
        dist.all_reduce(value)
    return value
