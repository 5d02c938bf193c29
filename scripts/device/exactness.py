"""Step `exactness`: the recorder on this device against one float64 backward pass per sample.

Random Llamas, untied with grouped queries and tied, in float32 and bfloat16, one batch of padded
rows; then, where the kit has it, SmolLM2-135M on sentences. The truth is a loop: the sample alone,
the same weights in float64, autograd. What the model's own precision costs is shown by autograd in
it, of one sample's loss in the padded batch that the recorder is given: the same activations, so
that the norms are to be the same too. Also what batch-mates, padding and TF32 change, and how
often one scored batch makes the host wait for the device.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from step import Step, first_line, random_batch, random_llama, start
from torch import Tensor

from grads_ds import GradNormRecorder

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, of every norm of every sample
GROUPS = {"embed_tokens": "embedding", "lm_head": "lm_head", "self_attn": "attention", "mlp": "mlp"}


def true_norms(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 [B] per group, and "total": autograd in float64 of each sample by itself."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    found = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0, :-1]
        found.append(own_norms(model, logits, labels[1:length]))
    return {group: torch.stack([one[group] for one in found]) for group in found[0]}


def norms_in_batch(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 [B] per group, and "total": autograd in the model's own precision of each sample's
    loss in the whole batch.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = []
    for row, labels in enumerate(batch["labels"]):
        logits = model(**inputs).logits[row, :-1].float()
        found.append(own_norms(model, logits, labels[1:]))
    return {group: torch.stack([one[group] for one in found]) for group in found[0]}


def own_norms(model: Any, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of one sample's mean loss, float64 per group."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    squares: dict[str, Tensor] = Counter()
    for name, parameter in model.named_parameters():
        group = next((GROUPS[key] for key in GROUPS if key in name), "norm")
        squares[group] += parameter.grad.double().square().sum()
        squares["total"] += parameter.grad.double().square().sum()
    if model.config.tie_word_embeddings:
        squares["lm_head"] = squares["embedding"]
    return {group: value.sqrt().cpu() for group, value in squares.items()}


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The largest relative error of each group's norms over the samples."""
    return {
        group: float(((found[group].cpu() - truth[group]).abs() / truth[group]).max())
        for group in truth
    }


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """float32 products in TF32, as users who want speed set it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def host_waits(recorder: GradNormRecorder, batch: dict[str, Tensor]) -> dict[str, int]:
    """Lines at which one scored batch makes the host wait for the GPU, and how often, once batches
    of its kind are known.
    """
    for _ in range(5):
        recorder.score(batch)
    cuda = batch["input_ids"].is_cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            recorder.score(batch)
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)
    )
    return dict(lines.most_common(20))


def measure(step: Step, name: str, model: Any, batch: dict[str, Tensor]) -> bool:
    """Record the errors of one model and batch; whether they keep the limit of its precision.

    A deep model in bfloat16 is itself further from float64 than the limit: there it is autograd in
    bfloat16 that the norms are held to.
    """
    limit = LIMITS[model.dtype]
    truth, own = true_norms(model, batch), norms_in_batch(model, batch)
    recorder = GradNormRecorder(model, "all")
    scored = recorder.score(batch).norms
    again = recorder.score(batch).norms
    alone = [
        recorder.score({key: value[row : row + 1] for key, value in batch.items()}).norms
        for row in range(len(batch["input_ids"]))
    ]
    facts: dict[str, Any] = {
        "limit": limit,
        "error": worst(scored, truth),
        "error_of_autograd": worst(own, truth),
        "error_against_autograd": worst(scored, own),
        "same_bits_twice": all(torch.equal(scored[g], again[g]) for g in truth),
        "batch_changes": worst(scored, {g: torch.cat([a[g].cpu() for a in alone]) for g in truth}),
    }
    if model.dtype == torch.float32:
        with tf32():
            facts["error_with_tf32"] = worst(recorder.score(batch).norms, truth)
    model.requires_grad_(True)
    with GradNormRecorder(model, "all") as watching:
        model(**batch).loss.backward()
        trained = watching.collect().norms
        facts["error_while_training"] = worst(trained, truth)
        facts["error_while_training_against_autograd"] = worst(trained, own)
    model.zero_grad()
    held = ["error", "error_while_training"]
    if model.dtype == torch.bfloat16:
        held = ["error_against_autograd", "error_while_training_against_autograd"]
    facts["exact"] = all(max(facts[name].values()) <= limit for name in held)
    step.record(**{name: facts})
    return bool(facts["exact"])


def sentences(folder: Path, count: int, device: torch.device) -> dict[str, Tensor]:
    """So many sentences of the real model, padded, every token but the first a target."""
    from gguf_model import SENTENCES
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        list(SENTENCES[:count]), padding=True, padding_side="right", return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {name: tensor.to(device) for name, tensor in (dict(batch) | {"labels": labels}).items()}


def run(step: Step) -> bool:
    """Every case; one that raises is recorded and the others go on."""
    width, layers, longest = (64, 2, 24) if step.cpu else (512, 6, 512)
    good = True
    for dtype in LIMITS:
        for tied in (False, True):
            name = f"{str(dtype)[6:]}, {'tied' if tied else 'untied, grouped queries'}"
            model = random_llama(
                width, layers, step.device, dtype, key_value_heads=None if tied else 2, tied=tied
            )
            lengths = [longest, longest * 3 // 4, longest // 2, longest // 3]
            batch = random_batch(lengths, model.config.vocab_size, step.device)
            good &= attempt(step, name, model, batch)
    step.record(host_waits=host_waits(GradNormRecorder(model, "all"), batch))
    if step.model is None:
        step.record(smollm2="skipped: there is no kit, or no model in it")
        return good
    from transformers import AutoModelForCausalLM

    for dtype in LIMITS:
        model = AutoModelForCausalLM.from_pretrained(step.model, dtype=dtype).to(step.device).eval()
        name = f"SmolLM2-135M, {str(dtype)[6:]}"
        good &= attempt(step, name, model, sentences(step.model, 2 if step.cpu else 4, step.device))
    return good


def attempt(step: Step, name: str, model: Any, batch: dict[str, Tensor]) -> bool:
    """`measure`, where an exception is a result."""
    try:
        return measure(step, name, model, batch)
    except Exception as error:
        step.record(**{name: first_line(error)})
        return False


if __name__ == "__main__":
    import sys

    from step import REPO

    sys.path.append(str(REPO / "scripts/quickstart"))  # the sentences
    start(run)
