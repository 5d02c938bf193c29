"""The head's logits are as exact as fp32 sums of the model's own numbers, in every precision."""

from __future__ import annotations

import pytest
import torch

from grads_ds.gradnorm.formulas.head import head_pass
from grads_ds.gradnorm.formulas.head_sums import Wanted
from grads_ds.gradnorm.formulas.logit_transform import LogitTransform


def losses(hidden: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    return head_pass(
        hidden,
        weight,
        None,
        torch.arange(40),
        [(0, 25), (25, 40)],
        torch.ones(2, dtype=torch.float64),
        transform=LogitTransform(),
        wanted=Wanted(),
        budget=budget,
    ).losses


@pytest.mark.parametrize("budget", [10**9, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_head_has_the_losses_of_its_own_numbers_in_float64(
    dtype: torch.dtype, budget: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(40, 64, generator=generator)
    weight = torch.randn(200, 64, generator=generator)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    before = torch.get_float32_matmul_precision()
    found = losses(hidden, weight, budget)
    true = losses(hidden.double(), weight.double(), budget)
    torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-5)
    assert torch.get_float32_matmul_precision() == before
