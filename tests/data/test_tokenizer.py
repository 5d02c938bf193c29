"""Loading a tokenizer with its template, and real tokenizers on real rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.formats import Sample, load_samples
from grads_ds.data.problems import Problems
from grads_ds.data.tokenizer import PLAIN_TEMPLATE, fingerprint, load_tokenizer
from grads_ds.data.tokens import Encoded, Encoder
from tests.data import twins
from tests.data.test_tokens import CHAT, SAID, answers, chat, encode, twin

__all__ = ["twin"]  # a fixture


def test_configured_template_replaces_the_tokenizers_own(twin: Any, tmp_path: Path) -> None:
    folder = twins.make_tokenizer(tmp_path / "t", twins.CHATML)
    (tmp_path / "mine.jinja").write_text(twins.LLAMA3)
    tokenizer = load_tokenizer(
        ModelConfig(path=str(folder), chat_template=str(tmp_path / "mine.jinja"))
    )
    assert tokenizer.chat_template == twins.LLAMA3
    assert fingerprint(tokenizer) != fingerprint(load_tokenizer(ModelConfig(path=str(folder))))
    assert fingerprint(load_tokenizer(ModelConfig(path=str(folder)))) == fingerprint(
        twin(twins.CHATML)
    )


def test_tokenizer_faults_are_the_users(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="wanted a tokenizer"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty")))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match="none that loads"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "broken")))
    good = twins.make_tokenizer(tmp_path / "good")
    with pytest.raises(UserError, match="Jinja file"):
        load_tokenizer(ModelConfig(path=str(good), chat_template=str(tmp_path / "none.jinja")))


def test_a_sentencepiece_model_alone_is_enough(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("\n".join("\n".join(twins.CORPUS).splitlines() * 20))
    folder = tmp_path / "model"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.vocab").unlink()
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    encoded = encode(tokenizer, Sample("s", "f:1", {}, text="The sky is blue."))
    assert encoded.input_ids == pieces.encode("The sky is blue.")
    got = answers(tokenizer, encode(tokenizer, chat(CHAT)))
    assert got == [SAID[0] + "</s>", SAID[1] + "</s>"]


# ---- real tokenizers -----------------------------------------------------------------------------

REAL = {
    "tokenizers/gpt2": "<|endoftext|>",
    "tokenizers/pythia": "<|endoftext|>",
    "tokenizers/llama2-32k": "</s>",
    "tokenizers/qwen": "<|im_end|>",
    "tokenizers/llama3": "<|eot_id|>",
    "models/base-8M": "<|end|>",
    "models/stories260K-hf": "</s>",
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_label_real_rows(material: Path, name: str) -> None:
    """On rows nobody made for it, the target text is the answer and its end token, turn by turn."""
    tokenizer = load_tokenizer(ModelConfig(path=str(material / name)))
    problems = Problems()
    files = [
        "general_glaive_multiturn.jsonl",
        "medicine_medquad6k.jsonl",
        "sharegpt_format_plain.json",
    ]
    for file in files:
        samples = [
            s
            for s, _ in zip(
                load_samples([str(material / "data" / file)], "auto", problems),
                range(15),
                strict=False,
            )
        ]
        # these templates know no tools
        encoder = Encoder(tokenizer, 10**6, dropped_content="count")
        for sample, encoded in zip(samples, encoder.encode(samples), strict=True):
            assert isinstance(encoded, Encoded)
            said = [m["content"] for m in sample.messages or [] if m["role"] == "assistant"]
            got = answers(tokenizer, encoded)
            assert [_plain(text) for text in got] == [_plain(text) + REAL[name] for text in said]
            bos = tokenizer.bos_token_id
            if bos is not None and bos != tokenizer.eos_token_id:
                assert encoded.input_ids.count(bos) <= 1
    assert not problems.count


def _plain(text: str) -> str:
    return "".join(text.split())


def test_the_plain_template_is_the_default(material: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(material / "tokenizers/llama2-32k")))
    assert tokenizer.chat_template == PLAIN_TEMPLATE.replace("{{ BOS }}", "{{ bos_token }}")
