"""Models whose own loss does not move the labels, as BART's decoder, are recorded while they train
with the targets that their loss has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradnorm import custom_models as custom
from gradnorm import small_models as models
from gradnorm.test_uses import recorded
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.trial.label_shift import takes_labels_unshifted

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 1, 12]


class Unshifted(custom.Wrapped):
    """Holds position t against labels[t]."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        output: Any = super().forward(input_ids)
        if labels is not None:
            output.loss = F.cross_entropy(output.logits.flatten(0, 1), labels.reshape(-1))
        return output


def moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each position's label is the next token: what users of such models pass."""
    return {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)}


def bart() -> torch.nn.Module:
    from transformers import BartConfig, BartForCausalLM

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=models.VOCAB,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=40,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return BartForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: Unshifted(custom.CalledTwice()), bart])
def test_labels_moved_by_the_user_give_the_norms_that_score_gives(make: Any) -> None:
    model, batch = make(), models.make_batch(LENGTHS, PROMPTS)
    true = models.truth(GradNormRecorder(model, "all"), model, batch)
    found = recorded(model, moved(batch))
    assert max(models.worst(found, true).values()) < 1e-5
    assert found.num_target_tokens.tolist() == true.num_target_tokens.tolist()
    torch.testing.assert_close(found.loss, true.loss, rtol=1e-5, atol=1e-6)


def test_labels_taken_as_given_reach_first_and_last_tokens() -> None:
    """A target at a row's last position, and one at its first token, are counted and measured."""
    model = Unshifted(custom.CalledTwice())
    batch = models.make_batch([7, 5, 6], [0, 2, 1])
    found = recorded(model, batch)
    assert found.num_target_tokens.tolist() == [7, 3, 5]
    twin = Unshifted(custom.CalledTwice())
    twin.load_state_dict(model.state_dict())
    twin.double()
    for row, length in enumerate([7, 5, 6]):
        twin.zero_grad()
        twin(
            batch["input_ids"][row : row + 1, :length], labels=batch["labels"][row, :length]
        ).loss.backward()
        own = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
        torch.testing.assert_close(found.norms["total"][row], own, rtol=1e-5, atol=0)


def test_whether_a_loss_moves_the_labels_is_read_off_its_gradient() -> None:
    batch = models.make_batch(LENGTHS, PROMPTS)
    for model, unshifted in (
        (Unshifted(custom.CalledTwice()), True),
        (custom.Wrapped(custom.CalledTwice()), False),
        (models.make_model("llama"), False),
    ):
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        assert takes_labels_unshifted(model, model.get_output_embeddings(), batch) is unshifted
        assert before == {name: p.requires_grad for name, p in model.named_parameters()}
        none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        assert takes_labels_unshifted(model, model.get_output_embeddings(), none) is False
