"""Sequence parallelism: the tokens of each sample spread over a group of neighbouring ranks, by
DeepSpeed's Ulysses attention.

The ranks of a group read the same rows and keep a slice of their tokens each; in every attention
layer they exchange tokens for heads. transformers and accelerate bring the engine and the attention
(`ParallelismConfig`); their own reader of batches is passed over, as a training that reads by it
cannot be resumed and needs rows of one length on gloo. Reads and writes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.distributed import ranks
from grads_ds.training.trainer import WEIGHTS, Collator, SftTrainer
from grads_ds.workarounds import forget_sequence_parallel

TARGETS = "shift_labels"  # int64 [B, T]: what each position is to predict, IGNORE where nothing


@contextlib.contextmanager
def sequence_parallel(size: int, attention: str) -> Iterator[ParallelismConfig]:
    """What TrainingArguments want for groups of `size` ranks, for the length of a training under
    `attention`.

    DeepSpeed puts its exchange in place of the process's attention function; it is put back here,
    for trainings and evaluations that follow in the same process (grads_ds/workarounds.py).
    """
    function = ALL_ATTENTION_FUNCTIONS[attention]
    try:
        yield ParallelismConfig(
            sp_size=size,
            dp_replicate_size=ranks.world() // size,
            sp_backend="deepspeed",
            sp_handler=DeepSpeedSequenceParallelConfig(sp_attn_implementation=attention),
        )
    finally:
        forget_sequence_parallel(attention, function)


class SliceCollator(Collator):
    """Rows -> this rank's slice of their batch: input_ids, position_ids, TARGETS and, where rows
    have weights, WEIGHTS, each [B, T / size].

    Rows are padded at the right to a multiple of `size`; attention is causal, so that nothing sees
    the padding.
    """

    def __init__(self, pad_id: int, size: int):
        super().__init__(pad_id)
        self.size, self.place = size, ranks.rank() % size

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        whole = super().__call__(rows)
        length = whole["input_ids"].shape[1]
        padded = length + -length % self.size
        batch = {
            "input_ids": nn.functional.pad(
                whole["input_ids"], (0, padded - length), value=self.pad_id
            ),
            "position_ids": torch.arange(padded).expand(len(rows), padded),
            TARGETS: nn.functional.pad(
                whole["labels"][:, 1:], (0, padded - length + 1), value=IGNORE_INDEX
            ),
        }
        if WEIGHTS in whole:
            batch[WEIGHTS] = nn.functional.pad(whole[WEIGHTS][:, 1:], (0, padded - length + 1))
        share = padded // self.size
        return {
            name: value[:, self.place * share : (self.place + 1) * share].contiguous()
            for name, value in batch.items()
        }


def slice_weights(batch: dict[str, Tensor]) -> Tensor:
    """How much the target of each position of a slice counts, float32 [B, T / size]: 0 where there
    is none.
    """
    targets = batch[TARGETS] != IGNORE_INDEX
    return targets * batch[WEIGHTS] if WEIGHTS in batch else targets.float()


class SequenceTrainer(SftTrainer):
    """The trainer over groups of ranks: the same rows in every optimizer step as without, the same
    loss.
    """

    weights = staticmethod(slice_weights)

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.loss_is_scaled_for_ga = True
        self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader

    def get_sp_size(self) -> int:
        """1: get_train_dataloader counts batches of groups already, and needs no correction."""
        return 1

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches dealt to groups as they are to single ranks without sequence parallelism."""
        size = self.data_collator.size
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=RandomSampler(self.train_dataset),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=ranks.world() // size,
            process_index=ranks.rank() // size,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This slice's share of the step's loss, times the ranks, by which DeepSpeed divides the
        gradients under ZeRO-3.

        Seen with DeepSpeed 0.19.8: below ZeRO-3, and with reduce_scatter off, it divides by the
        number of groups instead. `check_training` refuses both, as clipping would begin at another
        norm.
        """
        outputs = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        )
        ce = nn.functional.cross_entropy(
            outputs.logits.flatten(0, 1).float(),
            inputs[TARGETS].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="none",
        )
        loss = (ce * slice_weights(inputs).flatten()).sum() * ranks.world() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss
