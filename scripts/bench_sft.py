"""What fine-tuning costs here against plain TRL: the same model, rows and DeepSpeed file, block by
block in one run.

    python scripts/bench_sft.py [--pairs 120] [--output docs/bench_sft.json]

Two jobs of two ranks live side by side: ours through our launcher, supervised, with every hook of
`sft`; TRL's SFTTrainer through torchrun. One trains while the other waits: a block of optimizer
steps of one, of the other, of the other again, of the first, and so on, so that whatever else the
machine does meets both. Seconds are those from the word to go until the last rank is done, and the
ranks' processor time; the ratio of a pair is of the same steps on the same rows, and the losses of
both are compared. Interval: bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
SIDES, RANKS = ("ours", "trl"), 2
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TRAINING = {
    "learning_rate": 1e-3,
    "batch_size": 8,
    "micro_batch_size": 2,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.0,
}


def make(folder: Path, width: int, layers: int, vocabulary: int, rows: int, longest: int) -> int:
    """A random Llama with a tokenizer, rows of tokens of uneven lengths, a config and its DeepSpeed
    file; the number of parameters.
    """
    import torch
    import yaml
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=704 * width // 256,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=longest,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "model")
    words = {f"w{n}": n for n in range(vocabulary - 2)} | {
        "<pad>": vocabulary - 2,
        "</s>": vocabulary - 1,
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    ids = [
        draw.integers(0, vocabulary - 2, draw.integers(longest // 4, longest)).tolist()
        for _ in range(rows)
    ]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    Dataset.from_dict({"input_ids": ids, "labels": labels}).save_to_disk(str(folder / "rows"))
    (folder / "zero3.json").write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "gradient_clipping": "auto",
                "zero_optimization": {"stage": 3},
            }
        )
    )
    config = {
        "run_dir": str(folder / "run"),
        "deepspeed": str(folder / "zero3.json"),
        "data": {"train": ["none"]},
        "sft": TRAINING,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return int(model.num_parameters())


# ---- the ranks -----------------------------------------------------------------------------------


def baton(folder: Path, block: int) -> Any:
    """A callback that trains `block` optimizer steps whenever it is told to, and says what they
    took.
    """
    from transformers import TrainerCallback

    class Baton(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            port = int((folder / "port").read_text())
            self.line = socket.create_connection(("127.0.0.1", port)).makefile("rw")
            self.say({"side": os.environ["SIDE"]})

        def say(self, what: dict[str, Any]) -> None:
            self.line.write(json.dumps(what) + "\n")
            self.line.flush()

        def wait(self) -> None:
            assert self.line.readline() == "go\n"
            self.began, self.used = time.monotonic(), time.process_time()

        def done(self) -> None:
            self.say(
                {
                    "seconds": time.monotonic() - self.began,
                    "cpu_seconds": time.process_time() - self.used,
                }
            )

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % block == 0:
                if state.global_step:
                    self.done()
                self.wait()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.done()
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self.say({"losses": losses, "cpu_seconds_in_all": time.process_time()})

    return Baton()


def ours_rank(folder: Path, steps: int, block: int) -> None:
    """One rank of what `grads-ds sft` does."""
    from datasets import load_from_disk

    from grads_ds.config.load import load_config
    from grads_ds.distributed import heartbeat, ranks
    from grads_ds.training.train import TrainingJob, train_model

    heartbeat.start()
    ranks.start()
    config = load_config(folder / "config.yaml")
    rows = load_from_disk(str(folder / "rows"))
    train_model(
        TrainingJob(
            config,
            config.sft,
            rows,
            config.model.path,
            folder / "trained",
            folder / "work",
            folder / "tensorboard",
            steps,
            what="sft",
            callbacks=[baton(folder, block)],
            identity="test",
        )
    )
    ranks.finish()


def trl_rank(folder: Path, steps: int, block: int) -> None:
    """One rank of a plain TRL script with the same settings."""
    import deepspeed
    from datasets import load_from_disk
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from grads_ds.workarounds import skip_shared_memory_op

    # which nothing here uses, and a compiler would be needed
    skip_shared_memory_op(deepspeed)
    # on CPU the model is loaded before the trainer would do it
    deepspeed.init_distributed(verbose=False)
    micro = TRAINING["micro_batch_size"]
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=micro,
        max_steps=steps,
        warmup_steps=0,
        weight_decay=0.0,
        gradient_accumulation_steps=TRAINING["batch_size"] // RANKS // micro,
        learning_rate=TRAINING["learning_rate"],
        lr_scheduler_type=TRAINING["lr_scheduler"],
        max_grad_norm=1.0,
        deepspeed=str(folder / "zero3.json"),
        use_cpu=True,
        seed=0,
        data_seed=0,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=max(1, steps // 100),
        save_strategy="no",
        report_to=[],
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    SFTTrainer(
        model=str(folder / "model"),
        args=arguments,
        train_dataset=load_from_disk(str(folder / "rows")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[baton(folder, block)],
    ).train()


def launch_ours(folder: Path, steps: int, block: int) -> None:
    """Our launcher with its supervisors around `ours_rank`."""
    from grads_ds.launcher.hosts import Host
    from grads_ds.launcher.job import Placement, run_job

    command = [
        sys.executable,
        __file__,
        "ours-rank",
        "--folder",
        str(folder),
        *numbers(steps, block),
    ]
    raise SystemExit(
        run_job(
            "sft", command, Placement([Host("localhost", RANKS)], "local"), folder / "logs"
        ).status
    )


def numbers(steps: int, block: int) -> list[str]:
    return ["--steps", str(steps), "--block", str(block)]


# ---- the two jobs, in turn -----------------------------------------------------------------------


@contextlib.contextmanager
def jobs(folder: Path, steps: int, block: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Both jobs, started; what is left of them is killed at the end."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={RANKS}",
    ]
    commands = {
        "ours": [sys.executable, __file__, "ours"],
        "trl": [*torchrun, __file__, "trl-rank"],
    }
    started = {}
    try:
        for side, command in commands.items():
            with open(folder / f"{side}.log", "wb") as log:
                started[side] = subprocess.Popen(
                    [*command, "--folder", str(folder), *numbers(steps, block)],
                    env=os.environ | ENVIRONMENT | {"SIDE": side},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=REPO,
                )
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def measure(folder: Path, pairs: int, block: int) -> dict[str, Any]:
    """Every pair's ratios, ours to TRL's, and both curves."""
    steps = block * (pairs + 1)
    lines: dict[str, list[Any]] = {side: [] for side in SIDES}
    blocks: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with socket.create_server(("127.0.0.1", 0)) as server, jobs(folder, steps, block) as started:
        (folder / "port").write_text(str(server.getsockname()[1]))
        for _ in range(len(SIDES) * RANKS):
            line = accept(server, started, folder)
            lines[json.loads(line.readline())["side"]].append(line)
        for number in range(pairs + 1):
            for side in SIDES if number % 2 else reversed(SIDES):
                began = time.monotonic()
                for line in lines[side]:
                    line.write("go\n")
                    line.flush()
                said = [json.loads(line.readline()) for line in lines[side]]
                blocks[side].append(
                    {
                        "seconds": time.monotonic() - began,
                        "cpu_seconds": sum(rank["cpu_seconds"] for rank in said),
                    }
                )
        last = {side: [json.loads(line.readline()) for line in lines[side]] for side in SIDES}
        beside = {}
        for side, process in started.items():
            # with all descendants, each of which was waited for
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit((folder / f"{side}.log").read_text()[-3000:])
            beside[side] = used.ru_utime + used.ru_stime
    losses = {side: last[side][0]["losses"] for side in SIDES}
    differences = [abs(a - b) for a, b in zip(losses["ours"], losses["trl"], strict=True)]
    result: dict[str, Any] = {"steps": steps, "largest_difference_of_losses": max(differences)}
    result["losses"] = {side: [round(loss, 5) for loss in losses[side]] for side in SIDES}
    for what in ("seconds", "cpu_seconds"):
        ratios = [
            ours[what] / trl[what]
            for ours, trl in zip(blocks["ours"][1:], blocks["trl"][1:], strict=True)
        ]
        result[what] = {
            side: round(statistics.median(b[what] for b in blocks[side][1:]) / block, 4)
            for side in SIDES
        }
        result[what] |= {"ratio": round(geometric_mean(ratios), 4), "ratio_ci95": interval(ratios)}
        result[what]["ratios"] = [round(ratio, 4) for ratio in ratios]
    result["job_cpu_seconds"] = {side: round(used, 1) for side, used in beside.items()}
    return result


def accept(server: socket.socket, started: dict[str, subprocess.Popen[bytes]], folder: Path) -> Any:
    """The next rank's line; ends with a job's output where the job ends before its ranks have
    called.
    """
    server.settimeout(1)
    for _ in range(240):
        with contextlib.suppress(TimeoutError):
            rank = server.accept()[0]
            rank.settimeout(None)
            return rank.makefile("rw")
        for side, process in started.items():
            if process.poll() is not None:
                raise SystemExit(f"{side} ended: {(folder / f'{side}.log').read_text()[-3000:]}")
    raise SystemExit("\n".join((folder / f"{side}.log").read_text()[-3000:] for side in started))


def geometric_mean(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def interval(ratios: list[float]) -> list[float]:
    """95 % bootstrap interval of the geometric mean."""
    draws = np.random.default_rng(0).choice(np.log(ratios), size=(10_000, len(ratios)))
    return [
        round(float(bound), 4) for bound in np.exp(np.quantile(draws.mean(axis=1), [0.025, 0.975]))
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="both", choices=("both", "ours", "ours-rank", "trl-rank")
    )
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--block", type=int, default=1, help="optimizer steps of one turn")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a row, at most")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    roles = {"ours": launch_ours, "ours-rank": ours_rank, "trl-rank": trl_rank}
    if options.what in roles:
        roles[options.what](options.folder, options.steps, options.block)
        return
    with tempfile.TemporaryDirectory(prefix="bench_sft.") as folder:
        shape = (options.width, options.layers, options.vocabulary)
        parameters = make(
            Path(folder), *shape, 8 * options.block * (options.pairs + 1), options.longest
        )
        result = measure(Path(folder), options.pairs, options.block)
    from importlib.metadata import version

    versions = {name: version(name) for name in ("trl", "transformers", "deepspeed", "torch")}
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu_cores": os.cpu_count(),
        "versions": versions,
        "parameters": parameters,
    }
    head |= {
        "ranks": RANKS,
        "zero_stage": 3,
        "pairs": options.pairs,
        "steps_per_block": options.block,
    }
    text = re.sub(
        r"\[[^\[\]{}]*\]",
        lambda found: " ".join(found[0].split()),
        json.dumps(head | result, indent=1),
    )
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
