"""General corpus -> a tokenizer and a small language model that knows it: the quickstart's base
model.

    python scripts/quickstart/base_model.py [--material runs/quickstart/material] [--out
    runs/quickstart/base]

Reads general.jsonl and general_heldout.jsonl (scripts/quickstart/corpus.py). Writes a Hugging Face
folder: a SentencePiece tokenizer with chat marks and a pad token of its own, a Llama of 1.4 million
parameters pre-trained for a fixed number of steps, and base.json (settings, losses, seconds). A
second run with the same inputs does nothing and says so.

Plain torch on the CPU, about a minute on two cores. It exists so that fine-tuning has something to
build on and to forget.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.quickstart import chat_tokenizer
from scripts.quickstart.chat_tokenizer import CONTEXT, VOCABULARY, check_tokenizer, train_tokenizer

if TYPE_CHECKING:
    import torch

WIDTH, LAYERS, HEADS, MLP = 128, 4, 4, 384
BATCH = 6  # windows of CONTEXT tokens
LEARNING_RATE = 3e-3
WARMUP = 20  # steps
THREADS = 2


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_text(row: dict[str, Any], tokenizer: Any) -> str:
    """A row as the model sees it: plain text closed by the end mark, or a rendered chat."""
    if "text" in row:
        return str(row["text"]) + str(tokenizer.eos_token)
    return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))


def windows(rows: Sequence[dict[str, Any]], tokenizer: Any) -> torch.Tensor:
    """All rows, one after the other, cut into [N, CONTEXT + 1] windows; a remainder is left out."""
    import torch

    ids = tokenizer([as_text(row, tokenizer) for row in rows], add_special_tokens=False)[
        "input_ids"
    ]
    flat = torch.tensor([token for row in ids for token in row])
    count = (len(flat) - 1) // CONTEXT
    return torch.stack([flat[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(count)])


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Nats per token of a model that knows the tokens' frequencies alone."""
    counts = Counter(tokens.flatten().tolist())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def pretrain(model: Any, data: torch.Tensor, steps: int, seed: int) -> None:
    """`steps` AdamW steps on random windows, warmup then cosine."""
    import torch

    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / WARMUP)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, step / max(1, steps)))))
        ),
    )
    queue = torch.empty(0, dtype=torch.long)
    began, recent = time.monotonic(), 0.0
    model.train()
    for step in range(1, steps + 1):
        if len(queue) < BATCH:
            queue = torch.cat([queue, torch.randperm(len(data), generator=order)])
        batch_BT, queue = data[queue[:BATCH]], queue[BATCH:]
        loss = next_token_loss(model, batch_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
        recent += loss.item()
        if step % 30 == 0 or step == steps:
            width = (step - 1) % 30 + 1
            print(
                f"base: step {step}/{steps}, loss {recent / width:.3f},"
                f" {time.monotonic() - began:.0f} s",
                flush=True,
            )
            recent = 0.0


def next_token_loss(model: Any, batch_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats per token, of each token given those before it in its window."""
    import torch

    logits_BTV = model(input_ids=batch_BT[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())


def build(material: Path, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train tokenizer and model into `out`; returns the losses."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    set_seed(seed)
    began = time.monotonic()
    rows, held_out = (
        read_rows(material / "general.jsonl"),
        read_rows(material / "general_heldout.jsonl"),
    )
    contents = [
        r["text"] if "text" in r else "\n".join(m["content"] for m in r["messages"]) for r in rows
    ]
    tokenizer = train_tokenizer(contents, out)
    check_tokenizer(tokenizer, out, [*contents[:200], "naïve\n\tcafé — 東京", "two  spaces"])
    data, unseen = windows(rows, tokenizer), windows(held_out, tokenizer)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(
        f"base: {model.num_parameters() / 1e6:.2f} M parameters, {data.numel() / 1e3:.0f} k tokens",
        flush=True,
    )
    pretrain(model, data, steps, seed)
    model.eval()
    with torch.no_grad():
        loss = sum(
            next_token_loss(model, part).item() * len(part) for part in unseen.split(BATCH)
        ) / len(unseen)
    model.save_pretrained(out)
    return {
        "general_heldout_loss": loss,
        "unigram_entropy": unigram_entropy(unseen),
        "seconds": time.monotonic() - began,
        "torch": torch.__version__,
    }


def main() -> None:
    """Build the base model, or say that it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--material", type=Path, default=Path("runs/quickstart/material"))
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/base"))
    parser.add_argument(
        "--steps", type=int, default=330, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = [
        Path(__file__),
        Path(chat_tokenizer.__file__),
        args.material / "general.jsonl",
        args.material / "general_heldout.jsonl",
    ]
    inputs = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    inputs |= {"steps": str(args.steps), "seed": str(args.seed)}
    record = args.out / "base.json"
    if record.exists() and json.loads(record.read_text())["inputs"] == inputs:
        print(f"base: skipped, {args.out} is up to date")
        return
    aside = args.out.with_name(f"{args.out.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        results = build(args.material, aside, args.steps, args.seed)
        (aside / record.name).write_text(json.dumps({"inputs": inputs, **results}, indent=1))
        shutil.rmtree(args.out, ignore_errors=True)
        aside.rename(args.out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(
        f"base: held-out general loss {results['general_heldout_loss']:.3f} nats per token (token"
        f" frequencies alone: {results['unigram_entropy']:.3f}); done in {results['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
