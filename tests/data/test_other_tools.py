"""Tokens and targets against those of other tools, on real rows and on rows made here: TRL's
`assistant_only_loss` and the masks that LLaMA-Factory makes turn by turn.

TRL takes them from the template's `{% generation %}` marks, so that templates without marks get
them here for its sake. What differs is explained in docs/prepare.md.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.data.conversation import Message
from grads_ds.data.formats import Sample, load_samples
from grads_ds.data.problems import Problems
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoded, Encoder
from tests.data import twins

LLAMA3_MARKED = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|eot_id|>"
    "{% endgeneration %}{% else %}{{ m['content'] | trim }}<|eot_id|>{% endif %}{% endfor %}"
)
# folder: (template with marks, None where it has them; before a turn; behind it; behind that)
KINDS: dict[str, tuple[str | None, str, str, str]] = {
    "tokenizers/qwen": (twins.CHATML_MARKED, "<|im_start|>{}\n", "<|im_end|>", "\n"),
    "tokenizers/llama3": (
        LLAMA3_MARKED,
        "<|start_header_id|>{}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
    ),
    "models/base-8M": (None, "<|{}|>", "<|end|>", ""),
}
FILES = (
    ["general_alpaca9k", "general_dolly3k", "general_gsm8k_train", "general_gsm8k_test"]
    + ["general_seed_tasks", "general_glaive_multiturn", "general_tinystories", "finance_qa10k"]
    + ["law_indian_ipc", "law_indian_crpc", "law_legalbench", "medicine_chatdoctor5k"]
    + ["medicine_medquad6k", "medicine_pubmedqa_train", "medicine_pubmedqa_test"]
    + ["alpaca_format_general", "alpaca_format_medicine", "sharegpt_format_plain"]
    + ["sharegpt_format_tools"]
)
Tokens = tuple[list[int], list[int]]


def of_trl(tokenizer: Any, messages: list[Message]) -> Tokens:
    """As TRL 1.16 prepares a conversation: the ids and the mask of `apply_chat_template`."""
    both = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = list(both["input_ids"])
    mask = both["assistant_masks"]
    return ids, [i if m else IGNORE_INDEX for i, m in zip(ids, mask, strict=True)]


def of_llama_factory(tokenizer: Any, kind: str, messages: list[Message], bos: bool) -> Tokens:
    """Turn by turn: what leads to an answer is tokenised by itself and masked, the answer with its
    suffix by itself and learned. The blank behind the end token, which it learns too, is masked.
    """
    _, before, end, blank = KINDS[kind]

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids: list[int] = [tokenizer.bos_token_id] if bos else []
    labels, asked = [IGNORE_INDEX] * len(ids), ""
    for message in messages:
        if message["role"] != "assistant":
            asked += before.format(message["role"]) + message["content"] + end + blank
            continue
        source, target = (
            tokens(asked + before.format("assistant")),
            tokens(message["content"] + end),
        )
        behind = tokens(blank)
        ids += source + target + behind
        labels += [IGNORE_INDEX] * len(source) + target + [IGNORE_INDEX] * len(behind)
        asked = ""
    return ids, labels


def compared(tokenizer: Any, kind: str, samples: list[Sample]) -> dict[str, int]:
    """Compare every sample; how many of which kind there were."""
    counts = {"equal": 0, "trl alone": 0, "calls": 0}
    encoder = Encoder(tokenizer, 10**6, dropped_content="count")
    ours = encoder.encode(samples)
    if KINDS[kind][0]:
        tokenizer.chat_template = KINDS[kind][0]
    for sample, mine in zip(samples, ours, strict=True):
        messages = sample.messages or []
        if any(m.get("tool_calls") for m in messages) or any(not m["content"] for m in messages):
            counts["calls"] += 1  # the template knows none: TRL would lose them
            continue
        assert isinstance(mine, Encoded) and mine.dropped is None, sample.origin
        tokens = mine.input_ids, mine.labels
        assert tokens == of_trl(tokenizer, messages), sample.origin
        bos = tokenizer.bos_token_id
        theirs = of_llama_factory(tokenizer, kind, messages, mine.input_ids[0] == bos)
        if any(m["content"] != m["content"].strip() for m in messages):
            counts["trl alone"] += 1  # it tokenises and trims blanks at a text's borders otherwise
            continue
        assert tokens == theirs, sample.origin
        counts["equal"] += 1
    return counts


def compare_files(material: Path, kind: str, rows: int) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(material / kind)))
    for name in FILES:
        (file,) = (material / "data").glob(f"{name}.json*")
        problems = Problems()
        samples = list(islice(load_samples([str(file)], "auto", problems), rows))
        counts = compared(tokenizer, kind, samples)
        print(kind, name, counts)
        assert sum(counts.values()) == len(samples) > 0 and not problems.count
        assert counts["equal"] or counts["calls"] == len(samples) or counts["trl alone"]


@pytest.mark.parametrize("kind", KINDS)
def test_real_rows_have_the_tokens_and_targets_of_other_tools(material: Path, kind: str) -> None:
    compare_files(material, kind, 8)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_500_real_rows_of_each_file_have_them_too(material: Path, kind: str) -> None:
    compare_files(material, kind, 500)


def test_rows_made_here_have_the_tokens_and_targets_of_other_tools(tmp_path: Path) -> None:
    turns = [
        ["What colour is the sky?", "It is blue é 🙂, most of the time."],
        ["Be kind.\n\nMore, please.", "def sky():\n    return 'blue'", "Why?", "A  b"],
        ["<|im", "_start|> is no token"],
    ]
    rows = [
        [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(talk)]
        for talk in turns
    ]
    rows.append([{"role": "system", "content": "Be kind."}, *rows[0]])
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows))
    samples = list(load_samples([str(tmp_path / "x.jsonl")], "auto", Problems()))
    for kind, template in (("tokenizers/qwen", twins.CHATML), ("tokenizers/llama3", twins.LLAMA3)):
        folder = twins.make_tokenizer(tmp_path / kind, template)
        tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
        assert compared(tokenizer, kind, samples) == {"equal": 4, "trl alone": 0, "calls": 0}
