"""Fixtures shared by the tests: small models and tokenizers made on the spot, and real material
where it lies beside.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from grads_ds.launcher.runners import TORCH_VARIABLES

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed's Muon decorates functions with torch.compile, which imports the compiler in every rank
# (four seconds); no stage compiles
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

REPO = Path(__file__).resolve().parent.parent


GIVEN = {name: os.environ.get(name) for name in TORCH_VARIABLES}


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> None:
    """Libraries that train in this process leave its rank in the environment, where a later test's
    job takes it for its own.
    """
    for name, value in GIVEN.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def material() -> Path:
    """Real models, tokenizers and data, where they lie beside the checkout; the test is skipped
    elsewhere.
    """
    folder = REPO.parent / "shared" / "material"
    if not folder.is_dir():
        pytest.skip(f"needs the development material at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random two-layer Llama, tied, float32, with a word-level tokenizer and
    a chat template.
    """
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


WORDS = [
    "what",
    "is",
    "the",
    "a",
    "of",
    "to",
    "color",
    "sky",
    "blue",
    "red",
    "grass",
    "green",
    "answer",
    "question",
    "no",
    "yes",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How `-n` hands out the files, where no other `--dist` is asked for."""
    from tests.sharing import FromBothEnds

    return FromBothEnds(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests over hosts need a checkout whose path a remote shell leaves alone (the pdsh backend
    refuses others). Workers sort the files.
    """
    if hasattr(config, "workerinput"):
        from tests.sharing import sort

        sort(items)
    if re.fullmatch(r"[A-Za-z0-9@%+=:,./_-]+", str(REPO)):
        return
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(
                pytest.mark.skip(
                    reason=f"hosts are entered through shells, and {str(REPO)!r} is no word to them"
                )
            )


def make_tiny_model(folder: Path, tied: bool = True, layers: int = 2) -> Path:
    """Write the tiny model to `folder` and return it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    merges = []
    for word in WORDS:  # one merge path for each word, with its leading space
        left = "Ġ"
        for letter in word:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
        model_max_length=256,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: int, seed: int = 0) -> Path:
    """Write chats of random words, one a line, to `path` and return it."""
    draw = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(rows):
            question, answer = (
                " ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(2)
            )
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path
