"""Do rows of low gradient norm move the weights less than rows of high norm, by optimizer?

    python scripts/study/displacement.py --model MODEL --rows ROWS.jsonl --general GENERAL.jsonl \\
        [--out docs/results/displacement.json]

Scores rows by their total gradient norm, takes the lowest, the highest and random ones (as they
are, and matched in their number of target tokens), trains the model on each by AdamW and by SGD
at a constant rate without clipping, and prints how far the weights went, over seeds. SGD's rate is
set once, so that it moves the weights as far as AdamW on random rows; a tenth of it is tried too.
One process, no engine.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from grads_ds.data.collate import pad_batch
from grads_ds.data.formats import load_samples
from grads_ds.data.problems import Problems, RowProblem
from grads_ds.data.tokens import Encoder, num_target_tokens
from grads_ds.gradnorm import GradNormRecorder

BATCH = 8
ADAMW_RATE = 1e-4
Rows = list[dict[str, Any]]


def read_rows(file: Path, tokenizer: Any, wanted: int, longest: int) -> Rows:
    """The first `wanted` rows of a file of chats that fit, tokenised."""
    problems, rows = Problems(), []
    samples = load_samples([str(file)], "auto", problems)
    encoder = Encoder(tokenizer, longest, "drop", "count")
    for sample in samples:
        (encoded,) = encoder.encode([sample])
        if not isinstance(encoded, RowProblem) and not encoded.dropped:
            rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels})
        if len(rows) == wanted:
            break
    problems.raise_if_any()
    return rows


def batch_of(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in pad_batch(rows, 0).items()}


def norms_of(model: Any, rows: Rows) -> np.ndarray:
    """Each row's total gradient norm of its mean loss, float64 [N]."""
    recorder = GradNormRecorder(model, "all")
    found = [
        recorder.score(batch_of(rows[i : i + BATCH])).norms["total"]
        for i in range(0, len(rows), BATCH)
    ]
    return torch.cat(found).numpy()


def matched(norms: np.ndarray, targets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of low norm, rows of high norm) with the same lengths: of each `size` neighbours in
    length the lowest and the highest.
    """
    order = np.argsort(targets, kind="stable")
    groups = np.array_split(order, size)
    low = [group[np.argmin(norms[group])] for group in groups]
    high = [group[np.argmax(norms[group])] for group in groups]
    return np.array(low), np.array(high)


def loss_of(model: Any, rows: Rows) -> float:
    """Mean cross-entropy over the rows' target tokens, nats."""
    total = count = 0.0
    with torch.no_grad():
        for i in range(0, len(rows), BATCH):
            part = rows[i : i + BATCH]
            tokens = sum(num_target_tokens(row["labels"]) for row in part)
            total += float(model(**batch_of(part)).loss) * tokens
            count += tokens
    return total / count


def train(base: Any, rows: Rows, optimizer: str, rate: float, seed: int) -> dict[str, Any]:
    """One pass in a drawn order: how far the weights went, the mean norm of the steps' gradients,
    the trained model.
    """
    model = copy.deepcopy(base).train()
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    steps = kinds[optimizer.partition(",")[0]](model.parameters(), lr=rate, weight_decay=0.0)
    order, gradients = np.random.default_rng(seed).permutation(len(rows)), []
    for i in range(0, len(rows) - BATCH + 1, BATCH):
        model(**batch_of([rows[row] for row in order[i : i + BATCH]])).loss.backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        gradients.append(float(torch.stack(squares).sum().sqrt()))
        steps.step()
        steps.zero_grad()
    moved = [
        (p.detach().double() - q.detach().double()).square().sum()
        for p, q in zip(model.parameters(), base.parameters(), strict=True)
    ]
    model.eval()
    return {
        "displacement": float(torch.stack(moved).sum().sqrt()),
        "gradient": float(np.mean(gradients)),
        "model": model,
    }


def main() -> None:
    """Score, choose, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--general", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=512)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--longest", type=int, default=192)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.time()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    pool = read_rows(args.rows, tokenizer, args.pool, args.longest)
    general = read_rows(args.general, tokenizer, 32, args.longest)
    norms = norms_of(base, pool)
    targets = np.array([num_target_tokens(row["labels"]) for row in pool])
    order = np.argsort(norms, kind="stable")
    same_low, same_high = matched(norms, targets, args.size)
    arms = {
        "low": order[: args.size],
        "high": order[-args.size :],
        "low, same length": same_low,
        "high, same length": same_high,
        "random": np.random.default_rng(0).choice(len(pool), args.size, replace=False),
    }
    random_rows = [pool[row] for row in arms["random"]]
    reach = train(base, random_rows, "adamw", ADAMW_RATE, 0)["displacement"]
    trial = train(base, random_rows, "sgd", 1e-3, 0)["displacement"]
    rate = 1e-3 * reach / trial
    # at the matched rate rows of high norm may make SGD diverge; at a tenth they do not
    rates = {"adamw": ADAMW_RATE, "sgd": rate, "sgd, a tenth": rate / 10}
    before, results = loss_of(base, general), []
    for arm, chosen in arms.items():
        rows = [pool[row] for row in chosen]
        known = loss_of(base, rows)
        for optimizer, rate in rates.items():
            runs = [train(base, rows, optimizer, rate, seed) for seed in range(args.seeds)]
            distances = [run["displacement"] for run in runs]
            line = {
                "arm": arm,
                "optimizer": optimizer,
                "row_norm_mean": float(norms[chosen].mean()),
                "target_tokens_mean": float(targets[chosen].mean()),
                "step_gradient_mean": float(np.mean([run["gradient"] for run in runs])),
                "displacement_mean": float(np.mean(distances)),
                "displacement_min": min(distances),
                "displacement_max": max(distances),
                "own_loss_change": float(
                    np.mean([loss_of(run["model"], rows) - known for run in runs])
                ),
                "general_loss_change": float(
                    np.mean([loss_of(run["model"], general) - before for run in runs])
                ),
            }
            results.append(line)
            print(json.dumps(line), flush=True)
    record = {
        "script": "scripts/study/displacement.py",
        "model": args.model.name,
        "rows": args.rows.name,
        "general": args.general.name,
        "pool": len(pool),
        "rows_trained_on": args.size,
        "steps": args.size // BATCH,
        "batch": BATCH,
        "seeds": args.seeds,
        "rates": rates,
        "cpus": len(os.sched_getaffinity(0)),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - began),
        "results": results,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
