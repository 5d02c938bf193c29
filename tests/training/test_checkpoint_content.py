"""A file of a checkpoint that names code is refused with the name, and the code is not run: by the
reader of universal checkpoints, by DeepSpeed's own readers within it, and when a training goes on
(tests/training/test_stop_signal.py).
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from grads_ds.training import universal_checkpoint
from grads_ds.training.checkpoint_content import FORCED, tensors_alone


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def plant(file: Path, target: Path) -> None:
    """A checkpoint file that would make `target`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"optimizer_state_dict": Hostile(target), "param_shapes": [{}]}, file)


def test_nothing_that_a_file_names_is_run(tmp_path: Path) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    plant(tmp_path / "x.pt", tmp_path / "made")
    readers = (
        lambda: torch.load(tmp_path / "x.pt", weights_only=False),
        lambda: TorchCheckpointEngine().load(str(tmp_path / "x.pt")),
    )
    for read in readers:
        with tensors_alone(), pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir"):
            read()
        assert FORCED not in os.environ
    assert not (tmp_path / "made").exists()
    readers[0]()  # outside of it, the file does what it is made for
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("hostile", ["mp_rank_00_model_states.pt", "optim_states.pt"])
def test_a_hostile_checkpoint_is_not_rewritten(tmp_path: Path, hostile: str) -> None:
    source = tmp_path / "checkpoint-2/global_step2"
    source.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"optimizer_state_dict": {"zero_stage": 2}, "param_shapes": [{}]}, source / name)
    (file,) = source.glob(f"*{hostile}")
    plant(file, tmp_path / "made")
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.mkdir"):
        universal_checkpoint.main(source, tmp_path / "checkpoint-2/universal_global_step2")
    assert not (tmp_path / "made").exists()


def test_what_deepspeed_itself_writes_is_read(tmp_path: Path) -> None:
    """Loss scalers and stages are no tensors; a new class of theirs would have to be named."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2**8, 2, 1, 1, 1, False)
    value = [LossScaler(scale=1.0), scaler, ZeroStageEnum.weights, fragment_address(1, 2)]
    torch.save(value, tmp_path / "x.pt")
    with tensors_alone():
        found = torch.load(tmp_path / "x.pt", weights_only=False)
    assert [type(item) for item in found] == [type(item) for item in value]
