"""EL2N and the row without its prompt, by their definitions."""

from __future__ import annotations

import pytest
import torch

from grads_ds.gradnorm.formulas.error_norm import error_norms
from grads_ds.gradnorm.formulas.head import LogitTransform
from grads_ds.probe.prompts import without_prompt


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_error_vectors_where_the_model_is_all_but_certain(scale: float) -> None:
    """In single precision 1 - p would drown; the value of double precision is kept."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(9, 16, generator=generator),
        scale * torch.randn(50, 16, generator=generator),
    )
    logits = hidden.double() @ weight.double().T
    targets = logits.argmax(-1)
    others = logits.softmax(-1).scatter(1, targets[:, None], 0.0)
    true = (others.square().sum(-1) + others.sum(-1).square()).sqrt()
    for budget in (9 * 11, 2**20):
        torch.testing.assert_close(
            error_norms(hidden, weight, None, targets, LogitTransform(), budget),
            true,
            rtol=1e-3,
            atol=0,
        )


def test_without_the_prompt_the_targets_stay_the_same() -> None:
    ids, labels = (
        list(range(10, 22)),
        [-100, -100, -100, 13, 14, -100, -100, -100, 18, 19, 20, -100],
    )
    bare = without_prompt({"input_ids": ids, "labels": labels})
    assert bare["input_ids"] == [12, 13, 14, 17, 18, 19, 20]
    assert bare["labels"] == [-100, 13, 14, -100, 18, 19, 20]
    assert without_prompt({"input_ids": [1, 2], "labels": [1, 2]}) == {
        "input_ids": [1, 2],
        "labels": [1, 2],
    }
    assert without_prompt({"input_ids": [1, 2], "labels": [-100, -100]})["input_ids"] == [1]


@pytest.mark.parametrize("budget", [1, 50, 2**20])
def test_error_vectors_in_pieces_with_a_soft_cap(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator).double() for size in ((7, 5), (23, 5), (23,))
    )
    targets = torch.randint(0, 23, (7,), generator=generator)
    found = error_norms(hidden, weight, bias, targets, LogitTransform(0.5, 3.0), budget)
    logits = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0)
    expected = (logits.softmax(-1) - torch.nn.functional.one_hot(targets, 23)).norm(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
