"""Mistakes that other tools make, each shown to be absent here: every test computes the mistaken
value too and tells it apart.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from conftest import REPO
from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.formulas.linear import squares
from grads_ds.gradnorm.reference import reference_gradients

LENGTHS, PROMPTS = [13, 9, 6, 13], [3, 2, 0, 11]


def test_tied_tables_have_a_cross_term() -> None:
    model, batch = models.make_model("llama-tied"), models.make_batch(LENGTHS, PROMPTS)
    found = GradNormRecorder(model).score(batch).norms["embedding"]
    true = torch.stack(
        [g["model.embed_tokens.weight"].norm() for _, g in reference_gradients(model, batch)]
    )
    untied = models.make_model("llama-tied", tie_word_embeddings=False)
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.lm_head.weight})
    parts = GradNormRecorder(untied).score(batch).norms
    without = (parts["embedding"].square() + parts["lm_head"].square()).sqrt()
    torch.testing.assert_close(found, true, rtol=1e-5, atol=0)
    assert float(((without - true).abs() / true).max()) > 1e-3, (
        "the trap is not sprung by this example"
    )


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_padding_row_of_the_table_gets_no_gradient_even_where_the_token_is_real(
    name: str,
) -> None:
    model, batch = (
        models.make_model(name, pad_token_id=2, eos_token_id=2),
        models.make_batch(LENGTHS, PROMPTS),
    )
    batch["input_ids"][:, 2:5] = 2  # the end-of-text token, read in the middle of every sample
    batch["labels"][0, 4] = 2
    assert model.get_input_embeddings().padding_idx == 2
    recorder = GradNormRecorder(model, "all")
    assert (
        max(models.worst(recorder.score(batch), models.truth(recorder, model, batch)).values())
        < 1e-5
    )
    ignoring = models.make_model(name, pad_token_id=None, eos_token_id=2)
    other = GradNormRecorder(ignoring, ("embedding",)).score(batch).norms["embedding"]
    assert float((other / recorder.score(batch).norms["embedding"] - 1).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", "olmo2", "cohere", "gpt-oss", "stablelm"]
)
def test_normalisation_layers_of_any_class_are_counted(name: str) -> None:
    model, batch = models.make_model(name), models.make_batch(LENGTHS, PROMPTS)
    recorder = GradNormRecorder(model, ("norm",))
    found = recorder.score(batch).norms["norm"]
    true = torch.stack(
        [
            torch.stack(
                [g[n].square().sum() for n, kind in recorder.plan.groups.items() if kind == "norm"]
            )
            .sum()
            .sqrt()
            for _, g in reference_gradients(model, batch)
        ]
    )
    assert float(found.min()) > 0
    torch.testing.assert_close(found, true, rtol=1e-5, atol=0)


_PEAKS = """
import re, sys
sys.path[:0] = [{tests!r}, {repo!r}]
import torch
torch.set_num_threads(1)
from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder

settings = dict(
    hidden_size=96, intermediate_size=256, num_hidden_layers=10, max_position_embeddings=512
)
# of one kind, so that what is tried on the first batch of a kind is behind
large, small = models.make_batch([256] * 8, [8] * 8), models.make_batch([9] * 8, [1] * 8)
for how in (None, True, False):
    model = models.make_model("llama", **settings).train()
    if how is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=how))
        model.enable_input_require_grads()
    recorder = GradNormRecorder(model, "all")

    def train(batch):
        model(**batch).loss.backward()

    def record(batch):
        with recorder:
            train(batch)
            recorder.collect()

    for step in (train, recorder.score, record):
        step(small)
        open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
        status = open("/proc/self/status").read()
        before = int(re.search(r"VmRSS:\\s+(\\d+)", status)[1])
        step(large)
        print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) - before)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="needs Linux's /proc to measure peak memory",
)
def test_recording_every_layer_does_not_undo_activation_checkpointing() -> None:
    """Hooks that hold the first forward's inputs do, without a word.

    Measured: the process's peak, in KiB over what it held before.
    """
    code = _PEAKS.format(tests=str(REPO / "tests"), repo=str(REPO))
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | exact
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = [int(line) for line in done.stdout.split()]
    # each: training, scoring, recording while training
    whole, reentrant, other = peaks[0:3], peaks[3:6], peaks[6:9]
    for recomputed in (reentrant, other):
        for mode in range(3):
            assert recomputed[mode] < 0.3 * whole[mode], peaks
            assert recomputed[mode] < 1.15 * recomputed[0], peaks  # as much as plain training saves
    assert whole[1] < whole[0], "scoring needs less than training"


def test_sums_of_squares_do_not_drift_in_fp32() -> None:
    table = torch.full((1, 40_000, 64), 1e-3)
    table[0, 0] = 1e1
    true = float(table.double().square().sum())
    assert abs(float(squares(table)) / true - 1) < 1e-7
    running = torch.zeros(())
    for block in table[0, ::400]:
        running += (block * block).sum()
    assert abs(float(running) / float(table[0, ::400].double().square().sum()) - 1) > 1e-8, (
        "the trap is not sprung"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_neighbour_of_another_length_changes_nothing(attention: str) -> None:
    model = models.make_model("llama", attn_implementation=attention)
    recorder, batch = GradNormRecorder(model, "all"), models.make_batch(LENGTHS, PROMPTS)
    alone = recorder.score({name: tensor[2:3, :6] for name, tensor in batch.items()})
    for group, norm in recorder.score(batch).norms.items():
        torch.testing.assert_close(norm[2:3], alone.norms[group], rtol=1e-5, atol=0)


def test_there_is_one_norm_per_sample_and_not_per_key_of_the_batch() -> None:
    model, batch = models.make_model("llama"), models.make_batch([7] * 6, [1] * 6)
    found = GradNormRecorder(model).score({**batch, "position_ids": torch.arange(7).expand(6, 7)})
    assert {len(norm) for norm in found.norms.values()} == {6} == {len(found.loss)}


def test_a_batch_mean_does_not_leak_into_the_norms() -> None:
    """Two samples with very different numbers of targets: under a mean over the batch's tokens each
    is scaled by the other.
    """
    model, batch = models.make_model("llama"), models.make_batch([13, 13], [1, 11])
    recorder = GradNormRecorder(model, "all")
    assert (
        max(models.worst(recorder.score(batch), models.truth(recorder, model, batch)).values())
        < 1e-5
    )


def test_embedding_and_head_are_recorded_by_default() -> None:
    assert set(
        GradNormRecorder(models.make_model("llama")).score(models.make_batch([5], [1])).norms
    ) == {"embedding", "lm_head"}


class Functional(nn.Module):
    """Uses a weight that belongs to a module it never calls, one layer twice, and a bare parameter
    of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31, bias=False)
        self.mlp_uncalled, self.mlp_twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.shift = nn.Parameter(torch.randn(8))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> object:
        hidden = self.embed(input_ids).cumsum(1) + self.shift
        hidden = torch.tanh(
            nn.functional.linear(hidden, self.mlp_uncalled.weight, self.mlp_uncalled.bias)
        )
        hidden = self.mlp_twice(torch.sin(self.mlp_twice(hidden)))
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(hidden))


def test_what_no_rule_covers_goes_one_sample_at_a_time_and_is_never_left_out() -> None:
    torch.manual_seed(0)
    model, batch = Functional(), models.make_batch(LENGTHS, PROMPTS, vocabulary=31)
    recorder = GradNormRecorder(model, "all")
    found, true = recorder.score(batch), models.truth(recorder, model, batch)
    assert max(models.worst(found, true).values()) < 1e-5
    assert found.norms.keys() >= {"mlp", "other", "total"}
