"""The model's tokenizer with the chat template that will be used, and its fingerprint.

Reads a tokenizer folder (or hub id) and, when configured, a chat template file; writes nothing.
transformers (and with it torch, unless `load_no_models` was called) is imported when a tokenizer is
loaded, not before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.config.model_and_data import ModelConfig
from grads_ds.config.text_file import text_of

# For tokenizers without a chat template. BOS: the BOS token when the tokenizer adds one itself,
# else nothing.
PLAIN_TEMPLATE = (
    "{{ BOS }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '### Assistant:\\n' }}"
    "{% generation %}{{ m['content'] }}{{ eos_token or '\\n\\n' }}{% endgeneration %}"
    "{{ '\\n\\n' if eos_token }}"
    "{% else %}{{ '### ' + m['role'].capitalize() + ':\\n' + m['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)
_no_models = False
_without_torch = False  # transformers was imported without it


def load_no_models() -> None:
    """Have this process's tokenizers loaded without torch, which transformers imports beside them
    where it finds it: 3 s of a processor and 260 MB in each. For a process of which nothing loads a
    model with transformers, which stays without torch there.
    """
    global _no_models
    _no_models = True


@contextlib.contextmanager
def _transformers(model: ModelConfig) -> Iterator[None]:
    """Inside, transformers finds no torch after `load_no_models`; the model's own code always
    does, and so does a transformers that has looked for it before.
    """
    global _without_torch
    fresh = not {"torch", "transformers"} & sys.modules.keys()
    if not _no_models or model.trust_remote_code or not (fresh or _without_torch):
        yield
        return
    _without_torch = True
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # it would advise to install torch
    torch, said = sys.modules.get("torch"), os.environ.get(quiet)
    sys.modules["torch"], os.environ[quiet] = None, "1"  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"], os.environ[quiet]
        if torch is not None:
            sys.modules["torch"] = torch
        if said is not None:
            os.environ[quiet] = said


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer with the chat template that will be used set on it. Raises UserError.

    The template is `model.chat_template`'s file, else the tokenizer's own, else PLAIN_TEMPLATE.
    """
    problems = check_tokenizer(model)
    if problems:
        raise UserError(problems)
    with _transformers(model):
        return _load_tokenizer(model)


def _load_tokenizer(model: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    folder = Path(model.path)
    try:
        if folder.is_dir() and not any(
            (folder / f).is_file() for f in _TOKENIZER_FILES if f != "tokenizer.model"
        ):
            tokenizer = _sentencepiece_tokenizer(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                model.path, trust_remote_code=model.trust_remote_code
            )
    except UserError:
        raise
    except Exception as error:  # a damaged or foreign folder makes the library raise anything
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"model.path: wanted a tokenizer in {model.path}; found none that loads "
            f"({type(error).__name__}: {reason}); copy the tokenizer's files there"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            "model.path: wanted a tokenizer that reports character offsets; found "
            f"{type(tokenizer).__name__}, which does not; convert it to tokenizer.json "
            "(transformers' convert_slow_tokenizer)"
        )
    if model.chat_template:
        tokenizer.chat_template = text_of(
            Path(model.chat_template), "model.chat_template", "a chat template (Jinja)"
        )
    elif not tokenizer.chat_template:
        added = tokenizer("a").input_ids
        bos = tokenizer.bos_token if added and added[0] == tokenizer.bos_token_id else None
        tokenizer.chat_template = PLAIN_TEMPLATE.replace(
            "{{ BOS }}", "{{ bos_token }}" if bos else ""
        )
    return tokenizer


def check_tokenizer(model: ModelConfig) -> list[str]:
    """Problems that can be seen without loading anything."""
    problems = []
    folder = Path(model.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        problems.append(
            f"model.path: wanted a tokenizer in {folder} ({', '.join(_TOKENIZER_FILES[:3])} ...); "
            "found none; copy the tokenizer's files there"
        )
    if model.chat_template and not Path(model.chat_template).is_file():
        problems.append(
            f"model.chat_template: wanted a Jinja file; found none at {model.chat_template}; "
            "give an existing path or null"
        )
    return problems


def _sentencepiece_tokenizer(folder: Path) -> Any:
    """A folder with `tokenizer.model` alone: the class whose pieces are those of SentencePiece
    itself.
    """
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = "Once upon a time, there was\na 7-year-old girl."
    wanted = pieces.encode(text)
    for kind in (LlamaTokenizer, AutoTokenizer):
        tokenizer = kind.from_pretrained(folder)
        if tokenizer(text, add_special_tokens=False).input_ids == wanted:
            return tokenizer
    raise UserError(
        f"model.path: wanted tokenizer.model in {folder} to be read as SentencePiece itself reads"
        " it; found no tokenizer class that does; add the model's tokenizer_config.json or"
        " tokenizer.json"
    )


def fingerprint(tokenizer: Any) -> str:
    """32 hex digits that change with the vocabulary, the merges, the special tokens or the chat
    template.
    """
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ]
    parts.append(json.dumps(tokenizer.chat_template, sort_keys=True))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
