"""Records every sample's gradient norms while a transformers Trainer or TRL SFTTrainer trains, and
writes the score table.

    rows = ...                                   # the training rows; a column sample_id, where
                                                 there is one, names the samples
    record = GradNormCallback("scores", rows)
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, callbacks=[record])
    trainer.train()

Writes `scores/part-*.parquet` as training goes, and `scores/table.parquet` and
`scores/manifest.json` at the end of the first epoch: each sample once, with the optimizer step
whose weights its gradient is of. Later epochs are not recorded and cost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from grads_ds import scores
from grads_ds.config.columns import norm_columns
from grads_ds.distributed import ranks
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.probe.recording import rows_of
from grads_ds.probe.row_numbers import NUMBERS, numbered
from grads_ds.run_dir.provenance import package_versions
from grads_ds.scores.parts import parts


class GradNormCallback(TrainerCallback):
    """Writes the score table of `dataset`, the Trainer's `train_dataset`, to `folder`.

    Sample ids are `dataset`'s column sample_id, read here because the Trainer drops columns that
    the model does not know; without such a column, row numbers. sample_hash is taken from the
    column of that name, or left empty. layers, loss_reduction: as GradNormRecorder's.
    flush_seconds: how often parts are written. recording: what the parts say they depend on, when
    the caller knows it better than this does; merge=False leaves them to the caller. Raises
    ValueError, when training begins, for settings under which a sample has no norm of its own or
    cannot be told from others.
    """

    def __init__(
        self,
        folder: str | Path,
        dataset: Any,
        layers: str | tuple[str, ...] | list[str] = ("embedding", "lm_head"),
        *,
        loss_reduction: str = "mean",
        flush_seconds: float = 5.0,
        recording: scores.Recording | None = None,
        merge: bool = True,
    ) -> None:
        self.folder, self.layers, self.loss_reduction = Path(folder), layers, loss_reduction
        self.flush_seconds, self.recording, self.merge = flush_seconds, recording, merge
        known = getattr(dataset, "column_names", None) or []
        rows = len(dataset)
        self.ids = (
            np.asarray(dataset["sample_id"], np.int64) if "sample_id" in known else np.arange(rows)
        )
        self.hashes: Sequence[str] | None = (
            dataset["sample_hash"][:] if "sample_hash" in known else None
        )
        if len(np.unique(self.ids)) != rows:
            raise ValueError(
                f"sample_id must be different in every row; {rows} rows hold"
                f" {len(np.unique(self.ids))}"
            )
        self._columns = norm_columns(layers)
        self._recorder: GradNormRecorder | None = None
        self._open = contextlib.ExitStack()
        self._numbers: list[int] | None = None

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Starts to record, unless training goes on from a later epoch than the first."""
        self._open.close()  # of a training that was interrupted
        self._recorder = None
        problems = self._problems(args, train_dataloader)
        if problems:
            raise ValueError(
                "gradient norms cannot be recorded in this training:\n  " + "\n  ".join(problems)
            )
        if state.global_step and state.epoch >= 1:
            return
        recording = self.recording or scores.Recording(
            {
                "recorded": "while training",
                "model": type(model).__name__,
                "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
                "layers": list(self._columns),
                "loss_reduction": self.loss_reduction,
                "rows": len(self.ids),
                "id_sum": int(self.ids.sum()),
            },
            {"world_size": ranks.world(), "versions": package_versions()},
        )
        ranks.from_main(lambda: self._prepare(recording, afresh=state.global_step == 0))
        schema = scores.schema(self._columns, with_step=True)
        self._key, self._writer = (
            recording.key,
            scores.PartWriter(self.folder, ranks.rank(), recording, schema, self.flush_seconds),
        )
        self._recorder = GradNormRecorder(model, self.layers, loss_reduction=self.loss_reduction)
        self._open.enter_context(self._recorder)
        self._open.enter_context(numbered(train_dataloader))
        handle = self._recorder.model.register_forward_pre_hook(
            self._take_numbers, with_kwargs=True, prepend=True
        )
        self._open.callback(handle.remove)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch that no optimizer step follows."""
        self._collect(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch and the optimizer step after it."""
        self._collect(state.global_step - 1)
        if control.should_save and self._recorder is not None:
            # a run that goes on from this checkpoint will not see these samples again
            self._writer.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first epoch's end is the recording's."""
        self._finish(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For trainings that end without ending an epoch."""
        self._finish(args)

    def _problems(self, args: Any, loader: Any) -> list[str]:
        """What is wrong with these training arguments and this data loader, each with what to
        change.
        """
        found = []
        if args.label_smoothing_factor:
            found.append(f"label_smoothing_factor {args.label_smoothing_factor}: wanted 0")
        if args.torch_compile:
            found.append(
                "torch_compile: wanted False; recording reads the model by hooks, which compilation"
                " removes"
            )
        if args.n_gpu > 1:
            found.append(
                f"one process for {args.n_gpu} GPUs: start one per GPU (torchrun, accelerate or"
                " deepspeed)"
            )
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
            found.append(
                "a data set that is read as a stream has no rows to name: wanted one with a length"
            )
        elif len(dataset) != len(self.ids):
            found.append(
                f"the trainer made {len(dataset)} rows of {len(self.ids)}: switch off packing and"
                " filtering, or give this callback the rows as they are after them"
            )
        elif getattr(loader, "batch_sampler", None) is None:
            found.append(
                "a data loader without batches of its own: wanted per_device_train_batch_size to"
                " make them"
            )
        return found

    def _prepare(self, recording: scores.Recording, afresh: bool) -> None:
        scores.prepare_parts(self.folder, recording)
        if afresh:  # of an earlier start of the same training: its weights are not these
            for file, _ in parts(self.folder, recording.key):
                file.unlink()

    def _take_numbers(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        if NUMBERS not in kwargs:
            return None
        self._numbers = kwargs[NUMBERS].tolist()
        return args, {name: value for name, value in kwargs.items() if name != NUMBERS}

    def _collect(self, step: int) -> None:
        if self._recorder is None:
            return
        norms = self._recorder.collect()
        numbers, self._numbers = self._numbers, None
        if numbers is None:
            raise RuntimeError(
                "the batch reached the model without the numbers of its rows: a trainer that drops"
                " them"
            )
        if len(numbers) != len(norms.loss):
            raise ValueError(
                f"{len(numbers)} rows became {len(norms.loss)} samples in the batch: rows that hold"
                " several samples each have no ids for them; record rows that are not packed"
            )
        norms = norms.cpu()
        samples = {
            "sample_id": self.ids[numbers],
            "sample_hash": [self.hashes[i] for i in numbers]
            if self.hashes is not None
            else [""] * len(numbers),
            "num_tokens": norms.num_tokens.numpy(),
        }
        self._writer.add(rows_of(samples, norms, self._columns, {}, step))

    def _finish(self, args: Any) -> None:
        """Leaves model and data loader as they were and merges the parts of all ranks."""
        if self._recorder is None:
            return
        self._open.close()
        self._recorder = None
        self._writer.flush()
        ranks.barrier()
        if self.merge:
            ranks.from_main(self._merge)

    def _merge(self) -> None:
        try:
            scores.merge(
                self.folder,
                self._key,
                self.ids,
                {
                    "layers": self.layers,
                    "loss_reduction": self.loss_reduction,
                    "recorded": "while training",
                },
            )
        # no reason to lose the training, which stopped early or drops rows
        except scores.IncompleteScores as error:
            print(f"no score table, its parts are kept: {error}", flush=True)
