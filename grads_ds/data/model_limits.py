"""What of a tokenizer and of `data.max_length` the model cannot take, found before any engine
starts.

Reads the model's config.json and the header of its weights, never the weights; a hub id is asked
for its config. Serves `prepare` and `doctor`.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.template import EndlessTemplateError, bounded
from grads_ds.data.tokenizer import load_tokenizer

_LEARNED = re.compile(r"(?:^|\.)(?:wpe|embed_positions|position_embeddings)\.weight$")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Limits:
    """Rows of the embedding and positions of the model, None where nothing says so; whether the
    positions are learned, so that there is nothing beyond the last.
    """

    rows: int | None = None
    positions: int | None = None
    learned: bool = False


def model_limits(model: ModelConfig) -> Limits:
    """The limits of the model at `model.path`."""
    folder = Path(model.path)
    try:
        if folder.is_dir():
            shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import AutoConfig

            shape = AutoConfig.from_pretrained(
                model.path, trust_remote_code=model.trust_remote_code
            ).to_dict()
    except Exception:  # an absent or broken config is another check's problem to tell
        return Limits()
    shape = {**shape, **(shape.get("text_config") or {})}
    whole = [shape[key] for key in _POSITIONS if isinstance(shape.get(key), int)]
    rows = shape.get("vocab_size")
    return Limits(
        rows if isinstance(rows, int) else None, whole[0] if whole else None, _learned(folder)
    )


def _learned(folder: Path) -> bool:
    names: set[str] = set()
    for index in folder.glob("*.index.json"):
        names |= set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}))
    for file in folder.glob("*.safetensors"):
        from safetensors import SafetensorError, safe_open

        # weights that cannot be read are told by the rank that loads them
        with contextlib.suppress(SafetensorError), safe_open(file, "np") as header:
            names |= set(header.keys())
    return any(_LEARNED.search(name) for name in names)


def fit_problems(config: Config, tokenizer: Any | None = None) -> list[str]:
    """Problems between the tokenizer, the model and `data.max_length`. Raises UserError when there
    is no tokenizer.
    """
    tokenizer = tokenizer or load_tokenizer(config.model)
    limits = model_limits(config.model)
    path, problems = config.model.path, []
    if limits.rows is not None:
        beyond = _reachable_beyond(tokenizer, limits.rows)
        if beyond:
            shown = ", ".join(f"{text!r} ({number})" for text, number in beyond[:5])
            problems.append(
                f"model.path: wanted token ids below the {limits.rows:,} rows of the model's"
                f" embedding; found {len(beyond):,} beyond it in the tokenizer of {path}: {shown};"
                " resize the model's embedding (resize_token_embeddings) and save both, or remove"
                " the tokens"
            )
    if limits.learned and limits.positions and config.data.max_length > limits.positions:
        problems.append(
            f"data.max_length: wanted at most the {limits.positions:,} positions that {path} has"
            f" learned; found {config.data.max_length:,}; set it to {limits.positions}"
        )
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id:
        for what, ids in _beginnings(tokenizer):
            if ids[:2] == [bos, bos]:
                problems.append(
                    f"model.path: wanted {what} to begin with one BOS token"
                    f" ({tokenizer.bos_token}); found two; let the tokenizer or the template add it"
                )
    return problems


def _reachable_beyond(tokenizer: Any, rows: int) -> list[tuple[str, int]]:
    """Tokens beyond the embedding that a text can bring: ordinary ones, and of the special ones
    those with a role or in the chat template (others, like an image's, no text leads to).
    """
    beyond = sorted(
        ((text, number) for text, number in tokenizer.get_vocab().items() if number >= rows),
        key=lambda pair: pair[1],
    )
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template = str(tokenizer.chat_template)
    return [
        (text, number)
        for text, number in beyond
        if text not in special or text in roles or text in template
    ]


def _beginnings(tokenizer: Any) -> list[tuple[str, list[int]]]:
    found = [("plain text", list(tokenizer("a")["input_ids"]))]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        with bounded():
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except EndlessTemplateError:  # the first row tells it
        return found
    except Exception:  # a template that wants other turns is judged by the rows
        return found
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*found, ("a conversation", list(ids))]
