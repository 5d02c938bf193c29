"""A small SentencePiece tokenizer with chat marks, made from texts, and the check of its ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


VOCABULARY = 2048
CONTEXT = 256  # tokens
# The space before each content makes its first word the same token as inside a sentence.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- '<|' + message['role'] + '|> ' + message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
CHAT_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")


def train_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """A byte-pair SentencePiece model of `texts`, saved in `folder` as a Hugging Face tokenizer for
    chats.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,  # every text has tokens
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(CHAT_MARKS),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()  # a listing for people
    tokenizer = LlamaTokenizer.from_pretrained(
        folder,
        pad_token="<pad>",
        model_max_length=CONTEXT,
        add_bos_token=False,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def check_tokenizer(tokenizer: Any, folder: Path, texts: Iterable[str]) -> None:
    """Raise ValueError unless the conversion keeps SentencePiece's ids and every text comes back
    whole.
    """
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != pieces.encode(text) or tokenizer.decode(ids).strip() != text.strip():
            raise ValueError(f"the tokenizer in {folder} does not give back: {text!r}")
    if (
        len(
            {
                tokenizer.pad_token_id,
                tokenizer.eos_token_id,
                tokenizer.bos_token_id,
                tokenizer.unk_token_id,
            }
        )
        != 4
    ):
        raise ValueError(f"the special tokens of the tokenizer in {folder} are not distinct")
