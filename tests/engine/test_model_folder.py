"""A model folder is the model that was trained: adapters on tied layers, the end of an answer, and
the code of a model that brings its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_model
from grads_ds.data.stage import run_prepare
from grads_ds.engine.model_folder import save_model
from ranks import run_on_ranks
from tests.data import twins
from tests.training.test_train import logits, make_config, make_rows, train_and_look

ADAPTERS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head", "q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "rslora": {"rslora": True, "target_modules": ["lm_head", "q_proj"]},
    # none on the head: PEFT's magnitude of the tiny model's padding row, all zeros, is 0 / 0
    "dora": {"dora": True, "rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora embedding": {"dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "head whole": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "embedding whole": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
}


def train_adapters(base: Path, folder: Path) -> dict[str, np.ndarray]:
    """Logits of each model as it was trained."""
    found = {}
    for name, adapters in ADAPTERS.items():
        lora = {"r": 4, "alpha": 16} | adapters
        config = make_config(base, folder, model={"lora": lora}, sft={"learning_rate": 0.05})
        found[name] = train_and_look(config, name, adapter_dir=folder / f"{name} adapter")
    return found


def on_the_base(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of the base model with the adapter put on by PEFT."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([row["input_ids"] for row in make_rows()])
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, adapter)(ids).logits


def test_adapters_on_tied_layers_are_exported_as_they_were_trained(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", tied=True)
    (inside,) = run_on_ranks(1, train_adapters, base, tmp_path)
    for name, trained in inside.items():
        wanted = torch.from_numpy(trained)
        torch.testing.assert_close(logits(tmp_path / name), wanted, atol=1e-4, rtol=0)
        assert (wanted - logits(base)).abs().max() > 1e-2
        if name in ("rslora", "dora", "head whole"):
            adapted = on_the_base(base, tmp_path / f"{name} adapter")
            torch.testing.assert_close(adapted, wanted, atol=1e-4, rtol=0)
        tied = json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"]
        assert tied is (name == "dora")  # its adapters leave the tied weight alone


def chat_model(folder: Path, template: str = twins.CHATML) -> Path:
    """A small model whose EOS, </s>, is not what its template ends answers with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    twins.make_tokenizer(folder, template)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("known", [True, False], ids=["with", "without"])
def test_generation_of_the_exported_model_stops_where_training_did(
    tmp_path: Path, known: bool
) -> None:
    base = chat_model(tmp_path / "base")
    if not known:
        (base / "generation_config.json").unlink()
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there!"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    config = make_config(base, tmp_path, data={"train": str(rows)})
    run_prepare(config, tmp_path)
    from datasets import load_from_disk

    row = load_from_disk(str(tmp_path / "prepared/pool"))[0]
    ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    save_model(model, config, tmp_path / "model")

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert exported.generation_config.eos_token_id == [2, end]
    asked = tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    said = exported.generate(**asked, max_new_tokens=40, do_sample=False)[0]
    answer = tokenizer.decode(said[asked["input_ids"].shape[1] :])
    assert answer == "Hello there!<|im_end|>"


CODE = {
    "configuration_mine.py": (
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n"
        '    model_type = "mine"\n'
    ),
    "parts/__init__.py": "",
    "helper_mine.py": "GAIN = 1\n",
    "modeling_mine.py": (
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n"
        "from .helper_mine import GAIN\n\n\nclass MineForCausalLM(LlamaForCausalLM):\n"
        "    config_class = MineConfig\n"
    ),
}


def test_the_code_of_a_model_travels_with_it(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    for name, text in CODE.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    shape = json.loads((base / "config.json").read_text())
    shape |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (base / "config.json").write_text(json.dumps(shape))
    (base / ".git").mkdir()
    (base / ".git/hook.py").write_text("never")
    options: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    config = make_config(base, tmp_path, model={"trust_remote_code": True})
    save_model(model, config, tmp_path / "model")
    shutil.rmtree(base)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    ids = torch.arange(7, 17)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert not (tmp_path / "model/.git").exists()
