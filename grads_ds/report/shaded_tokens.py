"""Rows as pieces of text, each with the loss of the target tokens in it.

Reads the token losses that the probe recorded (`probe.extras: [token_losses]`), the prepared pool's
tokens and the tokenizer beside the model; no torch import.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grads_ds.config.errors import UserError, printable
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.report.read_run import Run
from grads_ds.scores.token_losses import read_token_losses
from grads_ds.selection.pool import read_tokens
from grads_ds.statistics import Floats, Ints

ALL_TOKENS = 250_000  # shaded in one page; of each row an equal share at most
MOST_TOKENS = 1000  # of one row


Piece = list[Any]  # [text, loss of the tokens that end in it, or None where none is a target]


def shaded_rows(run: Run, sample_ids: Sequence[int]) -> tuple[dict[int, list[Piece]], str]:
    """(pieces of each row that has token losses; why there are none, "" where there are some)."""
    try:
        losses = read_token_losses(run.run_dir / "scores", sample_ids)
        if not losses:
            return {}, (
                "Losses token by token were not recorded: name token_losses in probe.extras."
            )
        tokens = read_tokens(run.run_dir / "prepared/pool", list(losses))
    except (UserError, OSError, pa.ArrowInvalid) as error:
        return {}, printable(f"The losses of tokens cannot be shown: {error}")
    tokenizer = _tokenizer(run)
    if tokenizer is None:
        return {}, (
            "Losses token by token were recorded, but the tokenizer's tokenizer.json is not beside"
            " the model here."
        )
    most = min(MOST_TOKENS, max(50, ALL_TOKENS // max(1, len(losses))))
    shaded = {}
    for sample_id, (input_ids, labels) in tokens.items():
        # a row prepared anew has other targets than the losses are of
        if int((labels[1:] != IGNORE_INDEX).sum()) == len(losses[sample_id]):
            shaded[sample_id] = pieces(tokenizer, input_ids, labels, losses[sample_id], most)
    return shaded, "" if shaded else "The pool was prepared anew after its losses were recorded."


def pieces(
    tokenizer: Any, input_ids: Ints, labels: Ints, losses: Floats, most: int = MOST_TOKENS
) -> list[Piece]:
    """The text of the tokens from the first target's prompt to the last target, in order.

    Tokens that make a character together make one piece, with the mean of their losses; tokens that
    are no targets are joined. After `most` tokens the text ends in an ellipsis.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        input_ids, labels: int64 [T]; labels IGNORE_INDEX where no target. The first is never one.
        losses: of the targets in order, float64 [targets].
    """
    from tokenizers.decoders import DecodeStream

    stream, found = DecodeStream(skip_special_tokens=False), list[Piece]()
    held: list[float] = []  # losses of tokens whose character is not whole yet
    target = 0
    targets = np.flatnonzero(labels[1:] != IGNORE_INDEX) + 1
    start = max(0, int(targets[0]) - most // 4) if len(targets) else 0
    for place in range(start, min(len(input_ids), start + most)):
        text = stream.step(tokenizer, int(input_ids[place]))
        if place and labels[place] != IGNORE_INDEX:
            held.append(float(losses[target]))
            target += 1
        if not text:
            continue
        shown = printable(text.replace("\r\n", "\n"))
        loss = float(f"{np.mean(held):.3g}") if held else None
        if loss is None and found and found[-1][1] is None:
            found[-1][0] += shown
        else:
            found.append([shown, loss])
        held = []
    if start:
        found.insert(0, ["…", None])
    if start + most < len(input_ids):
        found.append(["…", None])
    return found


def _tokenizer(run: Run) -> Any:
    from tokenizers import Tokenizer

    path = str((run.config.get("model") or {}).get("path", ""))
    for folder in (run.run_dir / "probe/model", Path(path)):
        file = folder / "tokenizer.json"
        if file.is_file():
            return Tokenizer.from_file(str(file))
    return None
