"""How long the real quickstart will take here: one timed pass of the model, and arithmetic.

    python scripts/quickstart/real_eta.py CONFIG MODEL

Reads the pool's files and the model; writes nothing. Prints minutes for each stage and the time at
which it will end. The rate is measured, on whatever else the machine does now; what a stage takes
for each token is counted, not measured.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from grads_ds.config.config import Config
from grads_ds.config.load import load_config
from grads_ds.first_config.look_at_rows import read_rows, spooled

START = 25.0  # seconds that a stage's ranks take until they compute
# forward passes' worth of each token, a backward pass counted as two. Training: the optimizer's
# step and ZeRO's copies are guessed as two more. Scoring: ifd and prompt_gain take a pass each
TRAINED, SCORED, JUDGED = 5.0, 5.5, 1.2


def seconds_per_token(model: Any, tokens: int = 256) -> float:
    """Of one forward pass over rows of 64 tokens, the second of two."""
    ids = torch.randint(0, model.config.vocab_size, (tokens // 64, 64))
    for _ in range(2):
        began = time.monotonic()
        with torch.no_grad():
            model(input_ids=ids)
    return (time.monotonic() - began) / tokens


def row_tokens(files: list[str], tokenizer: Any, longest: int, spool: Path) -> int:
    """Tokens of all rows, cut at `longest`."""
    read_rows(files, spool, 0)
    texts = [tokenizer.apply_chat_template(s.messages, tokenize=False) for s, _ in spooled(spool)]
    spool.unlink()
    return sum(min(longest, len(ids)) for ids in tokenizer(texts)["input_ids"])


def minutes(config: Config, each: float, pool: int, held_out: int) -> dict[str, float]:
    """Minutes of each stage. `each`: seconds of a token's forward pass."""
    models = 1 + len(config.sft.variants)
    budget = config.select.budget if isinstance(config.select.budget, float) else 1.0
    trained = pool * budget * config.sft.epochs
    return {
        "probe": (START * 2 + each * SCORED * pool * (1 + 2 * config.probe.controls)) / 60,
        "sft": models * (START + each * TRAINED * trained) / 60,
        "evaluate": ((models + 1) * START + (models + 1) * each * JUDGED * held_out) / 60,
    }


def main() -> None:
    """Measure, and print the forecast."""
    config, folder = load_config(sys.argv[1]), sys.argv[2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spool = Path(config.data.train[0]).with_name("eta.spool")
    longest = config.data.max_length
    pool = row_tokens(list(config.data.train), tokenizer, longest, spool)
    sets = [file for files in config.data.validation_sources().values() for file in files]
    found = minutes(
        config, seconds_per_token(model), pool, row_tokens(sets, tokenizer, longest, spool)
    )
    total = sum(found.values())
    ends = datetime.now() + timedelta(minutes=total)
    parts = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
    print(f"quickstart: about {total:.0f} minutes from here ({parts}), until {ends:%H:%M}")


if __name__ == "__main__":
    main()
