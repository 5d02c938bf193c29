"""Exports: another tool's own reader, or its format's specification, finds every chosen row in what
was written.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_model
from grads_ds.cli import COMMANDS, main
from grads_ds.config.config import Config
from grads_ds.data.formats import detect, normalise
from grads_ds.data.sources import RawRow
from grads_ds.data.tokens import Encoder
from grads_ds.export import TOOLS
from grads_ds.flow.stages import STAGES
from grads_ds.run_dir.units import mark_done
from tests.export.subsets import CALLING, CALLS, MASKED, TURNS, export, turns, write


def test_trl_trains_on_it(run: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    base = make_tiny_model(tmp_path / "base")
    data = load_dataset(
        "json",
        data_files=str(export(run, "trl") / "subset.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert turns(data) == TURNS
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=3,
        assistant_only_loss=True,
        use_cpu=True,
        report_to=[],
        bf16=False,
        save_strategy="no",
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("rows", [CALLS, MASKED], ids=["tool calls", "weight 0"])
def test_trl_trains_on_the_tokens_that_we_train_on(
    run: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    trl = pytest.importorskip("trl")
    write(run, rows)
    base = make_tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CALLING
    encoder = Encoder(tokenizer, 256)
    samples = [normalise(RawRow("", "", "", row), detect(row) or "") for row in rows]
    ours = [(sample.input_ids, sample.labels) for sample in encoder.encode(samples)]  # type: ignore[union-attr]
    data = load_dataset(
        "json",
        data_files=str(export(run, "trl") / "subset.jsonl"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_length=256,
        assistant_only_loss=True,
        use_cpu=True,
        report_to=[],
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset
    assert [(row["input_ids"], row["labels"]) for row in theirs] == ours
    assert any(0 < sum(label == -100 for label in labels) < len(labels) for _, labels in ours)


def test_the_command_exports_and_refuses_a_folder_that_is_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished(run)))
    call = ["export", str(config), "--to", "axolotl", "--out", str(tmp_path / "there")]
    assert main(call) == 0 and "3 rows for axolotl" in capsys.readouterr().out
    assert main(call) == 2 and "wanted a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_of_the_list_is_named_by_the_help_and_has_a_writer(tool: str) -> None:
    file, title = TOOLS[tool]
    assert title in COMMANDS["export"][1]
    assert callable(import_module(f"grads_ds.export.{file}").write_rows)


def finished(run: Path) -> dict[str, Any]:
    """A config, all of whose units up to the selection are recorded as done in `run`."""
    zero = run.parent / "zero3.json"
    zero.write_text("{}")
    tree = {
        "run_dir": str(run),
        "model": {"path": "m"},
        "data": {"train": ["d"]},
        "probe": {"epochs": 0},
        "deepspeed": str(zero),
    }
    made = Config.model_validate(tree)
    for stage in STAGES[:3]:
        for unit in stage.units(made, run):
            outputs = [name for name in unit.outputs if (run / name).exists()]
            mark_done(run, unit.name, unit.inputs, outputs, 0.0)
    return tree


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda run, tree: tree["data"].update(max_length=64), "prepare: data.max_length"),
        (lambda run, tree: tree.update(select={"budget": 0.5}), "select.budget was 0.05, now 0.5"),
        (lambda run, tree: (run / "state/select.selected.json").unlink(), "not done yet"),
        (lambda run, tree: (run / "selection/selected.jsonl").write_text("{}"), "was altered"),
        (lambda run, tree: (run / "selection/selected.jsonl").unlink(), "is gone"),
    ],
)
def test_nothing_is_exported_but_a_finished_selection_of_this_config(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, wanted: str
) -> None:
    tree = finished(run)
    damage(run, tree)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert main(["export", str(config), "--to", "trl", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "export: wanted select/selected finished under this config" in said and wanted in said
    assert not (tmp_path / "out").exists()


def test_a_selection_of_an_earlier_config_is_not_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished(run)))
    call = ["export", str(config), "--to", "trl", "--out", str(tmp_path / "out")]
    assert main([*call, "--variant", "random"]) == 2
    assert "wanted a selection of this config; found random" in capsys.readouterr().err
