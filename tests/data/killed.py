"""Work for processes that are killed, of few imports: every process of a crew imports this."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from grads_ds.data.blocks import Block
from grads_ds.data.encoding import Outcome


def no_start(config: Any) -> None:
    """In the place of loading a tokenizer."""


def once(block: Block) -> Outcome:
    """Says the block's number; the first process that gets to number 4 is killed."""
    mark = Path(block.item.path)
    if block.first == 4 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(counts=Counter(read=block.first))


def always(block: Block) -> Outcome:
    """Is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
