"""Experts that older model code keeps in a list of modules are as exact as fused ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 0, 11]


class ListedExperts(nn.Module):
    """Experts as older model code keeps them: a list of modules, each called on the rows routed to
    it.
    """

    def __init__(self, fused: nn.Module, list_name: str) -> None:
        super().__init__()
        ends = [
            (up.detach(), down.detach())
            for up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
        ]
        self.act, self.list_name = nn.SiLU(), list_name
        experts = nn.ModuleList()
        for up, down in ends:
            expert = nn.ModuleDict(
                {
                    "up": nn.Linear(*up.T.shape, bias=False),
                    "down": nn.Linear(*down.T.shape, bias=False),
                }
            )
            expert["up"].weight.data, expert["down"].weight.data = up.clone(), down.clone()
            experts.append(expert)
        self.add_module(list_name, experts)

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.get_submodule(self.list_name)):
            rows, place = torch.where(chosen == number)
            gate, up = expert["up"](hidden[rows]).chunk(2, -1)
            out = out.index_add(
                0, rows, expert["down"](self.act(gate) * up) * weights[rows, place, None]
            )
        return out


@pytest.mark.parametrize("list_name", ["experts", "parts"])
def test_experts_in_a_list_are_as_exact_as_fused_ones(list_name: str) -> None:
    fused, batch = models.make_model("mixtral"), models.make_batch(LENGTHS, PROMPTS)
    true = models.truth(GradNormRecorder(fused, "all"), fused, batch)
    listed = models.make_model("mixtral")
    for layer in listed.model.layers:
        layer.mlp.experts = ListedExperts(layer.mlp.experts, list_name)
    recorder = GradNormRecorder(listed, "all")
    assert max(models.worst(recorder.score(batch), true).values()) < 1e-5
    with recorder:
        listed(**batch).loss.backward()
        assert max(models.worst(recorder.collect(), true).values()) < 1e-5
