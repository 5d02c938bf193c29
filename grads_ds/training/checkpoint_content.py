"""What the files of a checkpoint may hold: tensors, plain values, and the classes named here.

DeepSpeed reads its own checkpoints as pickles, which run whatever they name. Within `tensors_alone`
torch builds nothing else, also in processes started meanwhile, and a file that names another class
is refused with that name (pickle.UnpicklingError).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own: also where a caller asks for more


def allowed() -> list[Any]:
    """The classes that DeepSpeed writes into its checkpoints (0.19.8), none of which acts."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def tensors_alone() -> Iterator[None]:
    """No file that torch loads within this runs code."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(allowed()):
            yield
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before
