"""A recorded training that goes on, starts anew, or cannot be recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradnorm import small_models as models
from grads_ds import GradNormCallback
from tests.probe.trainings import ROWS, Snapshots, collate, compare, rows, settings


def test_going_on_from_a_checkpoint_and_starting_anew(tmp_path: Path) -> None:
    data = rows()

    def train(epochs: float, stop: int | None, resume: bool) -> list[dict[str, Any]]:
        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step == stop
                control.should_save = state.global_step == 2

        model = models.make_model("llama-tied")
        callback = GradNormCallback(tmp_path / "scores", data)
        arguments = TrainingArguments(**settings(tmp_path, num_train_epochs=epochs))
        trainer = Trainer(model, arguments, collate, data, callbacks=[Stop(), callback])
        trainer.train(resume_from_checkpoint=resume or None)
        table = tmp_path / "scores/table.parquet"
        return pq.read_table(table).to_pylist() if table.exists() else []

    whole = train(1, None, False)
    (tmp_path / "scores/table.parquet").unlink()
    assert not train(1, 3, False)  # stopped after the checkpoint
    assert train(1, None, True) == whole
    assert train(1, None, False) == whole  # the parts of the earlier starts do not mix in


def test_a_training_that_was_interrupted_leaves_nothing_in_the_way_of_the_next(
    tmp_path: Path,
) -> None:
    class Interrupt(TrainerCallback):
        times = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and not self.times:
                self.times = 1
                raise KeyboardInterrupt

    data, snapshots = rows(), Snapshots()
    callbacks = [GradNormCallback(tmp_path / "scores", data, "all"), snapshots, Interrupt()]
    trainer = Trainer(
        models.make_model("llama-tied"),
        TrainingArguments(**settings(tmp_path)),
        collate,
        data,
        callbacks=callbacks,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert compare(tmp_path / "scores/table.parquet", data, snapshots.weights) == 4


def test_settings_that_cannot_be_recorded_are_named_together(tmp_path: Path) -> None:
    data = rows()
    arguments = TrainingArguments(
        **settings(tmp_path, label_smoothing_factor=0.1, torch_compile=True)
    )
    callback = GradNormCallback(tmp_path / "scores", data.select(range(5)))
    trainer = Trainer(models.make_model("llama"), arguments, collate, data, callbacks=[callback])
    with pytest.raises(
        ValueError, match=r"(?s)label_smoothing_factor 0.1.*torch_compile.*22 rows of 5"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="different in every row"):
        GradNormCallback(
            tmp_path,
            data.add_column("x", [0] * ROWS)
            .remove_columns("sample_id")
            .rename_column("x", "sample_id"),
        )
