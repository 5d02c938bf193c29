"""`grads-ds init --from` takes over what means the same in other tools' configurations; the pages
docs/from/ show commands that run.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import REPO, write_rows
from grads_ds.cli import main, parser
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.first_config.machine import Machine
from grads_ds.first_config.other_tools import read_other
from grads_ds.first_config.write_config import Request, write_config

PAGES = ("axolotl", "llamafactory", "trl")


@pytest.fixture(autouse=True)
def in_a_folder_with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("chats.jsonl"), 40)
    Path("data").mkdir()
    rows = [{"instruction": f"what is {i}", "output": f"the answer {i}"} for i in range(40)]
    Path("data/alpaca.json").write_text(json.dumps(rows))
    entry = {"medicine": {"file_name": "alpaca.json"}}
    Path("data/dataset_info.json").write_text(json.dumps(entry))


def blocks(page: str) -> list[str]:
    """The indented blocks of a page: the tool's configuration, then the commands."""
    text = (REPO / f"docs/from/{page}.md").read_text()
    found = re.findall(r"(?:^    .*\n)+", text, re.M)
    return [re.sub(r"^    ", "", block, flags=re.M) for block in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_s_configuration_comes_in_and_its_commands_are_ours(
    page: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, commands = blocks(page)
    Path(f"{page}.yaml").write_text(config.replace("path/of/a/model", str(tiny_model)))
    init, *others = [shlex.split(line, comments=True)[1:] for line in commands.splitlines()]
    assert main(init) == 0
    told = capsys.readouterr().out
    assert "values are those of the" in told
    for words in others:
        assert parser(words).parse_args(words).command == words[0]
    found = load_config("grads.yaml")
    assert found.data.max_length == 128 and found.sft.epochs == 2
    assert (found.sft.micro_batch_size, found.sft.batch_size) == (2, 8)  # 2 x 2 x 2 ranks
    assert found.model.path == str(tiny_model)
    if page == "trl":
        assert found.sft.trainer.neftune_noise_alpha == 5 and found.model.lora is None
    else:
        assert found.model.lora is not None and found.model.lora.r == 8
        assert found.model.lora.target_modules == "all-linear"
    rate = {"axolotl": 2e-4, "llamafactory": 1e-4, "trl": 1e-3}[page]
    assert found.sft.learning_rate == found.probe.learning_rate == rate
    assert len((REPO / f"docs/from/{page}.md").read_text().splitlines()) <= 24


def test_what_has_no_like_here_is_named(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.yaml").write_text(
        f"base_model: {tiny_model}\ndatasets: [{{path: chats.jsonl}}]\nwandb_project: x\n"
        "optimizer: muon\nlr_scheduler: rex\n"
    )
    assert main(["init", "--from", "a.yaml"]) == 0
    assert "not taken over: lr_scheduler, optimizer, wandb_project" in capsys.readouterr().out


UNKNOWN = {
    "datasets: [{path: chats.jsonl, split: train, shards: 4}]\n5: x\nnested: {a: 1}": (
        "5, datasets.shards, datasets.split, nested"
    ),
    "datasets: chats.jsonl\nadapter: llama-adapter\nlora_r: 8": "adapter, lora_r",
    "datasets: chats.jsonl\nmicro_batch_size: auto\ngradient_accumulation_steps: many": (
        "gradient_accumulation_steps, micro_batch_size"
    ),
}


@pytest.mark.parametrize("text", list(UNKNOWN))
def test_every_key_that_is_not_taken_over_is_named_where_it_stands(text: str) -> None:
    Path("a.yaml").write_text(f"base_model: m\n{text}\n")
    assert ", ".join(read_other("a.yaml").left) == UNKNOWN[text]


def test_what_llama_factory_says_of_a_set_or_does_otherwise_is_named() -> None:
    entry = {"file_name": "alpaca.json", "formatting": "alpaca", "num_samples": 9, "ranking": True}
    Path("data/dataset_info.json").write_text(json.dumps({"medicine": entry, "odd": "x"}))
    text = "model_name_or_path: m\ndataset: medicine\nfinetuning_type: freeze\nstage: dpo\n"
    Path("l.yaml").write_text(text)
    left = ["finetuning_type", "medicine.num_samples", "medicine.ranking", "stage"]
    assert read_other("l.yaml").left == left
    Path("l.yaml").write_text("model_name_or_path: m\ndataset: odd\n")
    with pytest.raises(UserError, match="no such entry"):
        read_other("l.yaml")


def test_numbers_given_as_text_are_numbers() -> None:
    text = "base_model: m\ndatasets: chats.jsonl\nmicro_batch_size: '2'\nlearning_rate: 2e-4\n"
    Path("a.yaml").write_text(text + "gradient_accumulation_steps: '4'\n")
    found = read_other("a.yaml")
    values = {one.key: one.value for one in found.settings}
    assert values == {"sft.micro_batch_size": 2, "sft.learning_rate": 2e-4}
    assert found.accumulation == 4 and found.left == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base_model: null\ndatasets: chats.jsonl\n", "base_model: wanted a folder or hub id"),
        ("a: [1\n b", "line 2"),
        ("- a\n", "wanted a configuration of Axolotl"),
    ],
)
def test_a_file_that_names_no_model_or_is_no_yaml_is_told_where(text: str, told: str) -> None:
    Path("a.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_other("a.yaml")


BITS = {
    "a.yaml": "base_model: {m}\ndatasets: [{{path: chats.jsonl}}]\nadapter: qlora\n"
    "load_in_4bit: true\n",
    "l.yaml": "model_name_or_path: {m}\ndataset: medicine\nquantization_bit: {bits}\n",
    "t.yaml": "model_name_or_path: {m}\ndataset_name: chats.jsonl\nuse_peft: true\n"
    "load_in_4bit: true\n",
}


@pytest.mark.parametrize("file", list(BITS))
def test_a_base_in_4_bits_comes_over_and_is_plain_without_a_gpu(
    file: str, tiny_model: Path
) -> None:
    Path(file).write_text(BITS[file].format(m=tiny_model, bits=4))
    borrowed = read_other(file)
    asked = Request(borrowed.data, str(tiny_model), [], Path("gpu.yaml"), 0, borrowed)
    write_config(asked, Machine(1, "H100", 80.0, 8))
    lora = load_config("gpu.yaml").model.lora
    assert lora is not None and lora.load_in_4bit
    said = write_config(replace(asked, out=Path("cpu.yaml")), Machine(0, "", 0.0, 2))
    lora = load_config("cpu.yaml").model.lora
    assert lora is not None and not lora.load_in_4bit
    assert "load_in_4bit is left out: there is no GPU here" in said
    if file == "l.yaml":
        Path(file).write_text(BITS[file].format(m=tiny_model, bits=8))
        assert read_other(file).left == ["quantization_bit"]


def test_a_file_of_no_known_tool_or_with_foreign_columns_is_refused() -> None:
    Path("a.yaml").write_text("model: x\n")
    with pytest.raises(UserError, match="wanted a configuration of Axolotl"):
        read_other("a.yaml")
    entry = {"medicine": {"file_name": "alpaca.json", "columns": {"prompt": "question"}}}
    Path("data/dataset_info.json").write_text(json.dumps(entry))
    Path("b.yaml").write_text("model_name_or_path: m\ndataset: medicine, none\n")
    with pytest.raises(UserError) as caught:
        read_other("b.yaml")
    found = caught.value.problems
    assert len(found) == 2 and "columns question" in found[0] and "no such entry" in found[1]


def test_paths_are_looked_for_beside_the_file_too(tmp_path: Path) -> None:
    Path("sub").mkdir()
    write_rows(Path("sub/other.jsonl"), 4)
    Path("sub/t.yaml").write_text("model_name_or_path: m\ndatasets: [{path: other.jsonl}]\n")
    borrowed = read_other("sub/t.yaml")
    assert (borrowed.tool, borrowed.data, borrowed.model) == ("TRL", ["sub/other.jsonl"], "m")
