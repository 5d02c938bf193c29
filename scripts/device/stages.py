"""Step `stages`: the product's own stages on this device, and their memory against `plan`.

Prepares a pool of long rows, records, selects, trains and evaluates with ZeRO-3 on one rank,
through the command line; stages that use the device have a process of their own. Peaks of recording
and training are held against what `grads-ds plan` says of one such device.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from step import Step, random_llama, start, world_of_one

# what runs in one process: a stage on the device, and before it what that one reads
STAGES = (("prepare", "probe"), ("select", "sft"), ("evaluate",), ("report",))
PLANNED = {"probe": "recording", "sft": "sft"}  # what plan calls them
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_model(step: Step, folder: Path) -> None:
    """A random Llama and a tokenizer of bytes with a chat template, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(marks + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=marks[0],
        bos_token=marks[1],
        eos_token=marks[2],
        additional_special_tokens=marks[3:],
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    width, layers, vocabulary = (64, 2, 512) if step.cpu else (2048, 16, 32_000)
    dtype = torch.float32 if step.cpu else torch.bfloat16
    random_llama(width, layers, step.device, dtype, vocabulary=vocabulary).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_rows(path: Path, rows: int, letters: int, seed: int) -> str:
    """Chats of random words whose answers are `letters` long."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        words = ("".join(draw.choices(LETTERS, k=6)) for _ in range(letters // 7 + 1))
        turns = [("user", "".join(draw.choices(LETTERS, k=20))), ("assistant", " ".join(words))]
        lines.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_config(step: Step, folder: Path) -> Path:
    """The job: every row of the pool is as long as the longest that is allowed."""
    import yaml

    length = 64 if step.cpu else 2048
    write_model(step, folder / "model")
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    held_out = write_rows(folder / "held_out.jsonl", 8, length // 2, 1)
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "zero3.json"),
        "model": {"path": str(folder / "model"), "dtype": "float32" if step.cpu else "bfloat16"},
        "data": {
            "train": [write_rows(folder / "pool.jsonl", 64, 2 * length, 0)],
            "validation": {"domain": held_out, "general": held_out},
            "max_length": length,
        },
        "probe": {"epochs": 0, "tokens_per_microbatch": 8 * length},
        "select": {"budget": 0.25},
        "sft": {"epochs": 1, "batch_size": 4, "micro_batch_size": 2, "variants": []},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_stages(names: str, config: str, out: str) -> None:
    """Stages in this process, then the most memory they held on the device."""
    import torch

    from grads_ds.cli import main

    leave = os._exit

    def write_and_leave(status: int) -> None:
        cuda = torch.cuda.is_initialized()
        peak = torch.cuda.max_memory_allocated() if cuda else None
        Path(out).write_text(json.dumps({"peak": peak}))
        leave(status)

    os._exit = write_and_leave  # type: ignore[assignment]
    *before, last = names.split(",")
    for name in before:
        if status := main([name, config]):
            write_and_leave(status)
    if last != "report":  # of one rank, which leaves by os._exit
        world_of_one()
    write_and_leave(main([last, config]))


def planned(config: Path) -> dict[str, float]:
    """Bytes on the device that `grads-ds plan` says of each stage on one rank."""
    command = [sys.executable, "-m", "grads_ds", "plan", str(config), "--cluster", "1x1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 2):  # 2: something does not fit
        raise RuntimeError(done.stderr[-500:])
    forecasts = json.loads(done.stdout)
    return {item["stage"]: item["peak_bytes"] for item in forecasts}


def run(step: Step) -> bool:
    """The stages one after the other; the first that fails ends it."""
    folder = step.out.with_suffix(".run")
    folder.mkdir(exist_ok=True)
    config = write_config(step, folder)
    step.record(planned=planned(config))
    for names in STAGES[:2] if step.cpu else STAGES:
        stage = names[-1]
        result, log = folder / f"{stage}.json", folder / f"{stage}.log"
        command = [sys.executable, __file__, "--stages", ",".join(names), str(config), str(result)]
        began = time.monotonic()
        with log.open("w") as output:
            status = subprocess.run(command, stdout=output, stderr=output).returncode
        if status or not result.exists():
            lines = [line for line in log.read_text().split("\n") if "\r" not in line]
            step.record(**{stage: {"status": status, "last_lines": lines[-15:]}})
            return False
        facts = {"seconds": round(time.monotonic() - began, 1), **json.loads(result.read_text())}
        if stage in PLANNED and facts["peak"] is not None:
            said = step.found["planned"][PLANNED[stage]]
            facts["measured_to_planned"] = round(facts["peak"] / said, 3)
        step.record(**{stage: facts})
    return True


if __name__ == "__main__":
    if sys.argv[1] == "--stages":
        run_stages(*sys.argv[2:])
    start(run)
