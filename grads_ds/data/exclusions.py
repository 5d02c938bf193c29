"""Which turns are not to be learned: the keys by which the common formats mark a turn.

Pure functions over one turn. OpenAI and mistral-finetune write `weight`, Axolotl `train` or
`training`, LLaMA-Factory `loss_weight`, ms-swift `loss`, others `loss_mask`: 0 or false leaves the
turn out. torchtune writes `masked`, others `mask` or `ignore`: true leaves it out.
"""

from __future__ import annotations

import re
from typing import Any

from grads_ds.data.problems import RowProblem, found_text

LEARN = frozenset(
    ("weight", "train", "training", "trainable", "learn", "loss", "loss_weight", "loss_mask")
    + ("loss_scale", "do_train", "train_on", "train_on_turn", "is_trained", "compute_loss")
)
LEAVE_OUT = frozenset(
    ("mask", "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "no_train")
    + ("exclude", "excluded", "skip", "skip_loss", "mask_loss", "context_only")
)
_LOOKS_LIKE_A_MARK = re.compile(r"train|weight|loss|mask|learn|ignor|exclu|supervis|skip|target")
_TRUE, _FALSE = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


def read_marks(turn: dict[str, Any], where: str) -> tuple[bool | None, list[str], list[str]]:
    """(whether the turn is to be learned, None where nothing says so; the keys that say it; keys
    that look like a mark and are not known).

    Raises RowProblem on a value that is neither yes nor no, and on marks that contradict each
    other.
    """
    said: dict[str, bool] = {}
    unknown = []
    for key, value in turn.items():
        name = key.lower().replace("-", "_")
        if name in LEARN:
            said[key] = _yes_or_no(value, key, where)
        elif name in LEAVE_OUT:
            if (
                name == "mask"
                and not isinstance(value, bool)
                and str(value).lower() not in ("true", "false")
            ):
                raise RowProblem(
                    f"{where} with mask as true or false",
                    f"{found_text(value)}, which some tools read as learned and others as not",
                    "write weight: 0 or weight: 1",
                )
            said[key] = not _yes_or_no(value, key, where)
        elif _LOOKS_LIKE_A_MARK.search(name):
            unknown.append(key)
    if len(set(said.values())) > 1:
        marks = ", ".join(f"{key} {found_text(turn[key])}" for key in said)
        raise RowProblem(f"{where} with marks that say the same", f"{marks}", "keep one of them")
    return next(iter(said.values()), None), list(said), unknown


def _yes_or_no(value: Any, key: str, where: str) -> bool:
    word = str(value).strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise RowProblem(
        f"{where} with {key} 0 or 1", found_text(value), "use 0 or 1, or true or false"
    )
