"""What every step of the device check shares: its arguments, its result file, random models.

A step is a script of this folder, run by check.py in a process of its own:
`python scripts/device/NAME.py --out FILE [--cpu] [--kit DIR] [--seconds N]`. It writes FILE, one
JSON object, after every fact it finds, so that a crash or a time limit loses nothing before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPO = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"


@dataclass
class Step:
    """One step's arguments and what it has found. seconds: its time limit."""

    out: Path
    cpu: bool
    kit: Path | None
    seconds: float
    began: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the step computes."""
        import torch

        return torch.device("cpu" if self.cpu else "cuda")

    @property
    def model(self) -> Path | None:
        """The kit's SmolLM2-135M, where step `kit_model` has made it."""
        folder = self.kit / MODEL if self.kit else None
        return folder if folder and folder.is_dir() else None

    def record(self, **facts: Any) -> None:
        """Add facts to the result, write it, say them."""
        self.found |= facts
        aside = self.out.with_suffix(".part")
        aside.write_text(json.dumps(self.found, indent=1))
        aside.replace(self.out)
        for name, value in facts.items():
            print(f"{name}: {json.dumps(value)[:200]}", flush=True)

    def left(self) -> float:
        """Seconds until the time limit."""
        return self.seconds - (time.monotonic() - self.began)


def start(run: Callable[[Step], bool]) -> None:
    """Run a step from the command line; exit status 1 where it says that something is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="small sizes, to find mistakes")
    parser.add_argument("--kit", type=Path, help="where the pieces were unpacked")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    if args.cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    sys.exit(0 if run(Step(args.out, args.cpu, args.kit, args.seconds)) else 1)


def run_within(
    command: list[str], output: IO[str], seconds: float, folder: Path | None = None
) -> int | None:
    """Run in `folder` with stdout and stderr into `output`: the exit status, None if it was stopped
    at the time limit. What it started goes with it: it is asked to end, and killed 5 s later.
    """
    process = subprocess.Popen(
        command, stdout=output, stderr=output, start_new_session=True, cwd=folder
    )
    status = None
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status


def world_of_one() -> None:
    """Make this process the only rank of a job of its own."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def random_llama(
    width: int,
    layers: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    inner: int | None = None,
    vocabulary: int = 4096,
    key_value_heads: int | None = None,
    tied: bool = False,
    attention: str = "sdpa",
) -> Any:
    """A random Llama on the device, in evaluation mode.

    Args:
        width: of the hidden states; a multiple of 64, or heads of 16 below.
        layers: how many.
        device: where its weights are made.
        dtype: of its weights.
        inner: width of the MLP (default: 11/4 of the width).
        vocabulary: tokens.
        key_value_heads: fewer than query heads for grouped queries (default: as many).
        tied: whether the head is the embedding table.
        attention: transformers' name of the implementation.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = width // (64 if width >= 256 else 16)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner or width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def random_batch(
    lengths: list[int], vocabulary: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the right to [B, T]; the second half of each is targets."""
    import torch

    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=draw)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
        labels[row, length:] = -100
        labels[row, : length // 2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def synchronised_clock(device: torch.device) -> float:
    """Seconds of the wall clock, once the device has done its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
