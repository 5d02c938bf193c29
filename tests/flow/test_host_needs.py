"""What every host has to have is asked of every host: all files that a run reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grads_ds.config.load import load_config
from grads_ds.flow.host_needs import input_paths

FILES = ("model", "chat.jinja", "train.jsonl", "held.jsonl", "choices.jsonl", "exact.jsonl", "lm")


def test_task_files_include_path_and_chat_template_are_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        (tmp_path / name).touch()
    config = {
        "run_dir": "run",
        "model": {"path": "model", "chat_template": "chat.jinja"},
        "data": {"train": ["train.jsonl", "org/on-the-hub"], "validation": {"h": "held.jsonl"}},
        "evaluate": {
            "multiple_choice": {"m": "choices.jsonl"},
            "exact_match": {"e": "exact.jsonl"},
            "lm_eval": {"tasks": ["t"], "include_path": "lm"},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = input_paths(load_config("config.yaml", []))
    assert {str(tmp_path / name) for name in FILES} <= set(found)
    assert not any("on-the-hub" in path for path in found)
