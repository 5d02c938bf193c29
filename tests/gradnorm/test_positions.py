"""Learned positions that are looked up once, without a row, and added to every sample's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradnorm import custom_models as custom
from gradnorm import small_models as models
from gradnorm.test_uses import LENGTHS, PROMPTS, both_exact, recorded
from grads_ds.gradnorm import GradNormRecorder

WIDTH = custom.WIDTH


class Positions(nn.Module):
    """how: "added" to the rows, "without a gradient" (Pegasus), or "multiplied" by them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table = how, nn.Embedding(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "without a gradient"):
            positions = self.table(torch.arange(x.shape[1]))
        return torch.sin(x * positions if self.how == "multiplied" else x + positions)


@pytest.mark.parametrize("how", ["added", "without a gradient"])
def test_positions_that_all_rows_share_are_exact(how: str) -> None:
    model, batch = custom.Wrapped(Positions(how)), models.make_batch(LENGTHS, PROMPTS)
    both_exact(model, batch)
    both_exact(model, {key: tensor[:1] for key, tensor in batch.items()})


def test_shared_positions_used_in_another_way_are_exact_or_refused() -> None:
    model, batch = custom.Wrapped(Positions("multiplied")), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, "all")
    true = models.truth(recorder, model, batch)
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    with pytest.raises(RuntimeError, match=r"no rule measures body.table.weight"):
        recorded(model, batch)
