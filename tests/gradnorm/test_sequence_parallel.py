"""With each sequence shared by several ranks (DeepSpeed's Ulysses), every norm is that of the whole
sample, on every rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder
from ranks import run_on_ranks

CASES: list[tuple[str, Any]] = [
    ("llama", "all"),
    ("llama-tied", "all"),
    ("llama-biased", "all"),
    ("cohere", ("embedding", "lm_head")),
    ("qwen3-moe", "all"),
    ("llama", ("lm_head",)),
]
SETTINGS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "attn_implementation": "sdpa",
    "sliding_window": None,
}


def largest_errors(cases: list[tuple[str, Any]]) -> dict[str, float]:
    """The largest relative error of each case on this rank; DeepSpeed knows one model shape at a
    time, and these share theirs.
    """
    import torch.distributed as dist
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ranks, rank = dist.get_world_size(), dist.get_rank()
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    batch = models.make_batch([16, 11, 13], [3, 9, 0])
    positions = torch.arange(16).expand(3, 16)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    part = slice(16 // ranks * rank, 16 // ranks * (rank + 1))
    mine = {"input_ids": batch["input_ids"], "shift_labels": shifted, "position_ids": positions}
    mine = {name: tensor[:, part] for name, tensor in mine.items()}
    group: Any = None
    errors = {}
    for name, layers in cases:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        model = models.make_model(name, **SETTINGS, head_dim=8)
        whole = GradNormRecorder(model, layers)
        true = models.truth(whole, model, batch)
        anchor = whole.mean_gradient([batch]) if name == "llama-tied" else None
        if group is None:
            mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", ranks, 3)
            group, spread = mpu.get_sequence_parallel_group(), ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = spread
        recorder = GradNormRecorder(model, layers, sequence_group=group)
        found = recorder.score(mine)
        errors[f"{name} {layers}"] = max(models.worst(found, true).values())
        torch.testing.assert_close(found.loss, true.loss, rtol=1e-5, atol=0)
        assert found.num_target_tokens.tolist() == true.num_target_tokens.tolist()
        if anchor is not None:
            mean = recorder.mean_gradient([mine])
            errors["mean gradient"] = max(
                float((mean[n] - anchor[n]).norm() / anchor[n].norm()) for n in anchor
            )
            ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
            whole.set_reference(anchor)
            cosines = whole.score(batch).cosines["mlp"]
            ALL_ATTENTION_FUNCTIONS["sdpa"] = spread
            recorder.set_reference(anchor)
            errors["cosine"] = float((recorder.score(mine).cosines["mlp"] - cosines).abs().max())
    with pytest.raises(ValueError, match="score"), recorder:
        pass
    with pytest.raises(ValueError, match="shift_labels and position_ids"):
        recorder.score({"input_ids": mine["input_ids"], "labels": mine["input_ids"]})
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (4, CASES[1:2])])
def test_norms_of_sequences_that_ranks_share(world: int, cases: list[tuple[str, Any]]) -> None:
    for rank, errors in enumerate(run_on_ranks(world, largest_errors, cases)):
        assert len(errors) == len(cases) + 2
        assert not {case: error for case, error in errors.items() if not error < 1e-5}, (
            rank,
            errors,
        )
