"""What a model cannot take is found by prepare and doctor, exit status 2, before any engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_tiny_model
from grads_ds.cli import main
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data.model_limits import fit_problems, model_limits
from grads_ds.data.stage import run_prepare


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


def rows_of(path: Path, *answers: str) -> str:
    turns = [
        [{"role": "user", "content": "what"}, {"role": "assistant", "content": answer}]
        for answer in answers
    ]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return str(path)


def config_of(tmp_path: Path, model: Path, *answers: str, **data: Any) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(model)},
            "data": {"train": rows_of(tmp_path / "rows.jsonl", *answers or ("blue",))} | data,
        }
    )


def add_tokens(model: Path, tokens: list[str], special: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(model)


def positions(model: Path, number: int) -> None:
    """Make it a model whose 64 positions are learned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    shape = GPT2Config(
        vocab_size=vocabulary, n_positions=number, n_embd=8, n_layer=1, n_head=1, bos_token_id=1
    )
    GPT2LMHeadModel(shape).save_pretrained(model)


def told(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The faults of prepare; doctor has to tell the same with exit status 2."""
    with pytest.raises(UserError) as caught:
        run_prepare(config, tmp_path / "run")
    assert not (tmp_path / "run/prepared").exists()
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(include={"run_dir", "model", "data"})))
    capsys.readouterr()
    assert main(["doctor", str(file), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    for fault in caught.value.problems:
        assert any(fault in f"{f['found']}; {f['advice']}" for f in said if f["level"] == "problem")
    return caught.value.problems


def test_tokens_beyond_the_embedding_are_found(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_tokens(model, ["aspirin"], special=False)
    (fault,) = told(config_of(tmp_path, model), tmp_path, capsys)
    assert "'aspirin'" in fault and "resize" in fault


def test_a_special_token_that_no_text_leads_to_may_lie_beyond(tmp_path: Path, model: Path) -> None:
    """As an image's token does in models of text alone."""
    add_tokens(model, ["<image>"], special=True)
    assert fit_problems(config_of(tmp_path, model)) == []
    text = tmp_path / "t.jsonl"
    text.write_text('{"text": "see <image> there"}\n')
    config = config_of(tmp_path, model, train=str(text))
    with pytest.raises(UserError, match=r"t\.jsonl:1: wanted token ids below"):
        run_prepare(config, tmp_path / "run")


def test_max_length_beyond_learned_positions_is_found(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positions(model, 64)
    (fault,) = told(config_of(tmp_path, model), tmp_path, capsys)
    assert "the 64 positions" in fault and "set it to 64" in fault
    assert fit_problems(config_of(tmp_path, model, max_length=64)) == []


def test_rows_longer_than_rotary_positions_are_found(tmp_path: Path, model: Path) -> None:
    assert model_limits(config_of(tmp_path, model).model).positions == 256
    config = config_of(tmp_path, model, "blue", "blue " * 300)
    with pytest.raises(UserError, match=r"data\.max_length: .* 1 rows of pool with more"):
        run_prepare(config, tmp_path / "run")
    cut = config_of(tmp_path, model, "blue", "blue " * 300, max_length=256)
    run_prepare(cut, tmp_path / "run")


def test_a_doubled_bos_token_is_found(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = model / "chat_template.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}" + template.read_text())
    (fault,) = told(config_of(tmp_path, model), tmp_path, capsys)
    assert "a conversation to begin with one BOS" in fault


def test_padding_that_is_the_end_token_is_still_learned(tmp_path: Path, model: Path) -> None:
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    from grads_ds.data.collate import pad_batch

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    run_prepare(config_of(tmp_path, model, "blue", "the sky is blue"), tmp_path / "run")
    rows = list(load_from_disk(str(tmp_path / "run/prepared/pool")))
    batch = pad_batch(rows, tokenizer.pad_token_id)
    assert (batch["labels"] == tokenizer.eos_token_id).sum(axis=1).tolist() == [1, 1]
