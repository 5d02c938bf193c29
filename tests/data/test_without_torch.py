"""A process that loads no model reads tokenizers without torch, which would cost it three seconds
of a processor and 260 MB; what it writes is the same.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import REPO, make_tiny_model, write_rows
from grads_ds.cli import main
from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data import tokenizer

COMMAND = (
    "import sys; from grads_ds.cli import main; status = main();"
    " sys.exit(status or 100 * ('torch' in sys.modules))"
)
WORKER = (
    "import sys; from grads_ds.config.load import load_config;"
    " from grads_ds.data.crew import start; start(load_config('config.yaml'));"
    " sys.exit(100 * ('torch' in sys.modules))"
)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tiny_model(tmp_path / "model")
    write_rows(tmp_path / "pool.jsonl", 9)
    (tmp_path / "config.yaml").write_text(
        "run_dir: run\nmodel: {path: model}\ndata: {train: [pool.jsonl], max_length: 64}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def status_of(code: str, *arguments: str) -> tuple[int, str]:
    # the folder a job starts in leads to the checkout, as for a user
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); {code}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_prepare_writes_without_torch_what_it_writes_with_it(job: Path) -> None:
    status, said = status_of(COMMAND, "prepare", "config.yaml", "--set", "run_dir=alone")
    assert status == 0 and "PyTorch" not in said, said
    assert main(["prepare", "config.yaml"]) == 0 and "torch" in sys.modules
    alone, beside = (
        {
            str(file.relative_to(run)): file.read_bytes()
            for file in sorted((run / "prepared").rglob("*"))
            if file.is_file()
        }
        for run in (job / "alone", job / "run")
    )
    assert alone and alone == beside


def test_a_process_that_tokenises_blocks_has_no_torch(job: Path) -> None:
    status, said = status_of(WORKER)
    assert status == 0, said


@pytest.mark.parametrize("before", ["torch", "transformers", "torch, transformers", "sys"])
def test_a_process_that_has_torch_or_looked_for_it_keeps_it(job: Path, before: str) -> None:
    """A rank that shares a pool's preparation has met the others by torch."""
    status, said = status_of(
        f"import sys, {before}; from grads_ds.config.load import load_config;"
        " from grads_ds.data import tokenizer; tokenizer.load_no_models();"
        " model = load_config('config.yaml').model; tokenizer.load_tokenizer(model);"
        " tokenizer.load_tokenizer(model); sys.exit(100 * ('torch' in sys.modules))"
    )
    assert status == (0 if before == "sys" else 100), said


def test_a_models_own_code_finds_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_no_models", True)
    monkeypatch.setattr(tokenizer, "_without_torch", True)
    with tokenizer._transformers(ModelConfig(path="m", trust_remote_code=True)):
        assert importlib.util.find_spec("torch") is not None
    with tokenizer._transformers(ModelConfig(path="m")):
        assert importlib.util.find_spec("torch") is None
    assert sys.modules["torch"] is torch
