"""On several ranks every sample's norms are its own, under every ZeRO stage, also on a rank that
has nothing to score.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gradnorm import small_models as models
from grads_ds.gradnorm import GradNormRecorder
from ranks import run_on_ranks


def _engine(model: Any, stage: int, train: bool, offload: bool = False) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # take apart the small parameters too
    if offload:
        zero |= {"offload_param": {"device": "cpu"}} | (
            {"offload_optimizer": {"device": "cpu"}} if train else {}
        )
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3) if train else None
    if train:
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]


def _gather(parameters: Any) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def _batch(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Different lengths and numbers of samples on every rank; in step 1 no target at all on the
    last rank.
    """
    import torch.distributed as dist

    batch = models.make_batch(
        [9 + rank, 6, 11][: 2 + rank % 2], [2, 1, 3][: 2 + rank % 2], seed=10 * rank + step
    )
    if step == 1 and rank == dist.get_world_size() - 1:
        batch["labels"][:] = -100
    return batch


def score_frozen(name: str, stage: int, layers: Any, offload: bool) -> list[float]:
    """The largest relative error of each of three steps on this rank."""
    import torch.distributed as dist

    model = models.make_model(name)
    whole = copy.deepcopy(model)
    # these shard an optimizer's state, which a model that only scores has not: score between steps
    trains = stage in (1, 2)
    model.requires_grad_(trains)
    engine = _engine(model, stage, trains, offload) if stage else None
    inner = engine.module if engine else model
    recorder = GradNormRecorder(engine or model, layers)
    plain = GradNormRecorder(whole, layers)
    errors = []
    for step in range(3):
        batch = _batch(dist.get_rank(), step)
        errors.append(
            max(models.worst(recorder.score(batch), models.truth(plain, whole, batch)).values())
        )
    if stage == 3:
        engine.optimizer.release_backward_leftovers()
        assert all(p.numel() == 0 for p in inner.parameters()), "parameters stayed gathered"
    return errors


def train_and_record(name: str, stage: int, offload: bool) -> list[float]:
    """Recording inside DeepSpeed's own training steps; the truth is made of the weights of each
    step.
    """
    import torch.distributed as dist

    torch.manual_seed(0)
    model = models.make_model(name)
    engine = _engine(model, stage, True, offload)
    recorder = GradNormRecorder(engine, "all")
    errors = []
    for step in range(0, 4, 2):
        with _gather(engine.module.parameters()):
            whole = models.copy_of(name, engine.module)
        plain = GradNormRecorder(whole, "all")
        batch = _batch(dist.get_rank(), step)
        with recorder:
            engine.backward(engine(**batch).loss)
            found = recorder.collect()
        if stage == 3:
            _trap_of_the_average(engine, found.norms["embedding"])
        engine.step()
        errors.append(max(models.worst(found, models.truth(plain, whole, batch)).values()))
    return errors


def _trap_of_the_average(engine: Any, own: torch.Tensor) -> None:
    """After a backward ZeRO-3 holds the mean over all ranks' samples, the same on every rank:
    nobody's own gradient.
    """
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    average = safe_get_full_grad(engine.module.get_input_embeddings().weight).double().norm()
    everyones = [torch.zeros_like(average) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, average)
    assert all(torch.isclose(other, average) for other in everyones)
    assert float((own / average - 1).abs().min()) > 1e-2, "the trap is not sprung by this example"


def record_under_accelerate(name: str) -> list[float]:
    """Recording in an Accelerate loop (DistributedDataParallel here), accumulating over two
    micro-batches.
    """
    import torch.distributed as dist
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = models.make_model(name)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    assert prepared is not model
    errors = []
    with GradNormRecorder(prepared, "all") as recorder:
        for step in range(0, 6, 2):
            with accelerator.accumulate(prepared):
                batch = _batch(dist.get_rank(), step)
                true = models.truth(recorder, models.copy_of(name, model), batch)
                accelerator.backward(prepared(**batch).loss)
                errors.append(max(models.worst(recorder.collect(), true).values()))
                optimizer.step()
                optimizer.zero_grad()
    return errors


# model, ZeRO stage (0: no engine), layers, parameters offloaded
FROZEN: list[tuple[str, int, Any, bool]] = [
    ("llama", 3, "all", False),
    ("llama-tied", 3, ("embedding", "lm_head"), False),
    ("llama", 3, ("lm_head",), False),
    ("gpt2", 3, "all", False),
    ("qwen2-moe", 3, "all", False),
    ("gpt-oss", 3, "all", False),
    ("llama-tied", 3, "all", True),
    ("llama-tied", 2, "all", False),
    ("llama-tied", 0, "all", False),
]
TRAINED = [
    ("llama-tied", 1, False),
    ("llama", 2, False),
    ("llama-tied", 3, False),
    ("llama", 3, True),
]


def every_case() -> dict[str, list[float]]:
    """All cases in one process group: starting ranks takes longer than all of them."""
    found = {f"frozen {case}": score_frozen(*case) for case in FROZEN}
    found |= {f"trained {case}": train_and_record(*case) for case in TRAINED}
    found |= {f"fsdp2 {name}": under_fsdp2(name) for name in ("llama-tied", "mixtral")}
    return found | {"accelerate": record_under_accelerate("llama-tied")}


def under_fsdp2(name: str) -> list[float]:
    """The recorder made before fully_shard; made after it, it is refused. Scored twice, trained."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = models.make_model(name)
    whole = copy.deepcopy(model)
    plain, recorder = GradNormRecorder(whole, "all"), GradNormRecorder(model, "all")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="before fully_shard"):
        GradNormRecorder(model)
    errors = []
    for step in range(2):
        batch = _batch(dist.get_rank(), step)
        found = recorder.score(batch)
        errors.append(max(models.worst(found, models.truth(plain, whole, batch)).values()))
    assert all(parameter.grad is None for parameter in model.parameters())
    batch = _batch(dist.get_rank(), 0)
    with recorder:
        model(**batch).loss.backward()
        found = recorder.collect()
    errors.append(max(models.worst(found, models.truth(plain, whole, batch)).values()))
    return errors


def one_case() -> dict[str, list[float]]:
    """One case, for more ranks than cores."""
    return {"frozen gemma2": score_frozen("gemma2", 3, "all", False)}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(2, every_case), (4, one_case)])
def test_norms_on_every_rank_are_those_of_its_own_samples(world: int, cases: Any) -> None:
    for rank, found in enumerate(run_on_ranks(world, cases)):
        wrong = {case: errors for case, errors in found.items() if not max(errors) < 1e-5}
        assert not wrong, (rank, wrong)
